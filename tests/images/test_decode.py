"""Decoding of images of every format and mode."""

import hashlib
import io
import random
import struct
import time
import zlib
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from services.core.errors import NotAnImage, TooLarge
from services.images.decode import Limits, downscale, prepare
from services.images.image_format import (
    FRAMES_LIMIT,
    count_gif_frames,
    count_jpeg_scans,
    count_tiff_pages,
    detect_format,
    is_plain,
)
from tests.support.pictures import (
    FORMATS,
    LIMITS,
    bmff_box,
    difference,
    encoded,
    picture,
    png_chunk,
    png_header,
    shown,
    textured,
    with_png_chunk,
)

TOLERANCE = {"heic": 6.0, "gif": 4.0}

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow warns of every broken image


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_decodes_to_the_same_picture(kind: str) -> None:
    data = encoded(picture(), kind)
    prepared = prepare(data, LIMITS)
    assert detect_format(data) == kind
    assert prepared.facts.model_dump() == {"width": 96, "height": 64, "format": kind, "frames": 1}
    assert prepared.sha256 == hashlib.sha256(data).hexdigest()
    assert difference(shown(prepared), picture()) < TOLERANCE.get(kind, 2.0)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "avif", "heic"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    stored_as = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = picture() if stored_as is None else picture().transpose(stored_as)
    exif = Image.Exif()
    exif[0x0112] = orientation
    # As bytes, for pillow-heif then also writes the rotation that HEIC really has; its EXIF says nothing to viewers.
    prepared = prepare(encoded(stored, kind, exif=exif.tobytes()), LIMITS)
    assert (prepared.facts.width, prepared.facts.height) == (96, 64)
    assert difference(shown(prepared), picture()) < TOLERANCE.get(kind, 2.0)


def test_oriented_image_is_downscaled() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture(1600, 900).transpose(Image.Transpose.ROTATE_90), "jpeg", exif=exif)
    prepared = prepare(data, LIMITS)
    assert (prepared.width, prepared.height) == (512, 288)
    assert (prepared.facts.width, prepared.facts.height) == (1600, 900)
    assert difference(shown(prepared), picture(512, 288)) < 3


@pytest.mark.parametrize("exif", [b"", b"MM", b"II*\0\xff\xff\xff\xff", b"nonsense" * 99, b"MM\0*\0\0\0\x08\xff\xff"])
def test_broken_exif_is_ignored(exif: bytes) -> None:
    for data in (with_png_chunk(encoded(picture(), "png"), b"eXIf", exif), encoded(picture(), "jpeg", exif=exif)):
        assert difference(shown(prepare(data, LIMITS)), picture()) < 2


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_invalid_orientation_is_ignored(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    assert difference(shown(prepare(encoded(picture(), "png", exif=exif), LIMITS)), picture()) < 2


# Modes


@pytest.mark.parametrize("kind", ["png", "tiff", "webp", "avif", "heic"])
def test_alpha_is_composited_over_white(kind: str) -> None:
    image = picture().convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 48, 32))
    expected = picture()
    expected.paste("white", (0, 0, 48, 32))
    assert difference(shown(prepare(encoded(image, kind), LIMITS)), expected) < 6


def test_transparent_pixels_do_not_bleed_into_others() -> None:
    image = Image.new("RGBA", (1024, 1024), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 1024, 512))
    result = shown(prepare(encoded(image, "png"), LIMITS))
    column = (result.getpixel((9, y)) for y in range(512))
    assert all(abs(red - green) <= 8 for red, green, _ in column)


def test_palette_with_transparency_is_composited_over_white() -> None:
    image = picture().quantize(16)
    index = image.getpixel((2, 2))
    expected = picture()
    expected.paste("white", (0, 0, 48, 32))
    for kind in ("png", "gif"):
        assert difference(shown(prepare(encoded(image, kind, transparency=index), LIMITS)), expected) < 4


def test_palette_with_partial_transparency_is_composited_over_white() -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0, 255, 255, 255])
    result = shown(prepare(encoded(image, "png", transparency=bytes([128, 255])), LIMITS))
    assert abs(result.getpixel((4, 4))[0] - 127) <= 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "LAB"])
def test_tiff_of_every_mode_decodes_to_the_same_picture(mode: str) -> None:
    gray = picture().convert("L")
    source = {
        "1": gray.point(lambda level: 255 * (level > 100), "1"),
        "L": gray,
        "LA": gray.convert("LA"),
        "P": picture().quantize(16),
        "LAB": ImageCms.profileToProfile(
            picture(), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        ),
    }.get(mode) or picture().convert(mode)
    expected = gray if mode in ("L", "LA") else source.convert("RGB") if mode == "1" else picture()
    assert difference(shown(prepare(encoded(source, "tiff"), LIMITS)), expected) < 4


def test_inverted_cmyk_jpeg_of_adobe_is_not_a_negative() -> None:
    data = encoded(picture().convert("CMYK"), "jpeg")
    assert b"Adobe" in data
    assert difference(shown(prepare(data, LIMITS)), picture()) < 4


def test_gray_jpeg_becomes_rgb() -> None:
    gray = picture().convert("L")
    prepared = prepare(encoded(gray, "jpeg"), LIMITS)
    assert difference(shown(prepared), gray) < 2


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bit_gray_is_scaled_not_clipped(kind: str) -> None:
    ramp = Image.new("I;16", (256, 16))
    for x in range(256):
        for y in range(16):
            ramp.putpixel((x, y), x * 257)
    result = shown(prepare(encoded(ramp, kind), LIMITS))
    assert all(abs(result.getpixel((x, 8))[0] - x) <= 3 for x in range(256))


def test_sixteen_bit_rgb_png_is_scaled() -> None:
    rows = b"".join(
        b"\0" + b"".join(struct.pack(">HHH", x * 1000, 0x8000, 0xFFFF) for x in range(64)) for _ in range(16)
    )
    data = png_header(64, 16, depth=16) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    prepared = prepare(data, LIMITS)
    assert prepared.data != data
    red, green, blue = shown(prepared).getpixel((32, 8))
    assert abs(red - 125) <= 3
    assert abs(green - 128) <= 3
    assert blue >= 253


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 255.0), (0.0, 65535.0), (-5.0, 1e6)])
def test_floating_point_tiff_is_scaled(low: float, high: float) -> None:
    ramp = Image.linear_gradient("L").convert("F").point(lambda level: level * ((high - low) / 255) + low)
    result = shown(prepare(encoded(ramp, "tiff"), LIMITS))
    assert difference(result, Image.linear_gradient("L")) < 2


@pytest.mark.parametrize("level", [float("nan"), float("inf")])
def test_infinite_levels_are_rejected(level: float) -> None:
    with pytest.raises(NotAnImage):
        prepare(encoded(Image.new("F", (8, 8), level), "tiff"), LIMITS)


def test_rgb_png_with_a_transparent_colour_is_composited_over_white() -> None:
    expected = picture()
    expected.paste("white", (0, 0, 48, 32))
    data = encoded(picture(), "png", transparency=(220, 30, 30))
    assert difference(shown(prepare(data, LIMITS)), expected) < 2


def test_png_gamma_is_applied_as_in_browsers() -> None:
    data = with_png_chunk(encoded(Image.new("RGB", (32, 32), (60, 60, 60)), "png"), b"gAMA", struct.pack(">I", 4_545))
    assert shown(prepare(data, LIMITS)).getpixel((5, 5))[0] < 5
    data = with_png_chunk(encoded(Image.new("RGB", (32, 32), (60, 60, 60)), "png"), b"gAMA", struct.pack(">I", 200_000))
    assert shown(prepare(data, LIMITS)).getpixel((5, 5))[0] > 150


def test_colour_profile_is_applied_unless_it_is_broken() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for content in (profile, b"nonsense" * 100, profile[:200]):
        prepared = prepare(encoded(picture(), "jpeg", icc_profile=content), LIMITS)
        assert difference(shown(prepared), picture()) < 3
        assert b"ICC_PROFILE" not in prepared.data


# Size


@pytest.mark.parametrize("kind", FORMATS)
def test_downscaling_keeps_the_picture(kind: str) -> None:
    prepared = prepare(encoded(picture(1800, 1200), kind), LIMITS)
    assert (prepared.width, prepared.height) == (512, 341)
    assert (prepared.facts.width, prepared.facts.height) == (1800, 1200)
    assert difference(shown(prepared), picture(512, 341)) < 5


@pytest.mark.parametrize("size", [(1, 1), (1, 60_000), (60_000, 1), (3, 9_001), (511, 513)])
def test_image_of_extreme_size_is_decoded(size: tuple[int, int]) -> None:
    for kind in ("png", "jpeg", "gif", "tiff"):
        prepared = prepare(encoded(Image.new("RGB", size, "red"), kind), LIMITS)
        assert min(shown(prepared).size) >= 1
        assert max(shown(prepared).size) <= 512


def test_small_image_is_not_enlarged() -> None:
    prepared = prepare(encoded(picture(20, 10), "gif"), LIMITS)
    assert (prepared.width, prepared.height) == (20, 10)


def test_downscale_keeps_the_picture_and_its_facts() -> None:
    prepared = prepare(encoded(picture(1800, 1200), "png"), LIMITS)
    small = downscale(prepared, 96)
    assert (small.width, small.height, small.sha256, small.facts) == (96, 64, prepared.sha256, prepared.facts)
    assert difference(shown(small), picture()) < 5
    assert downscale(prepared, 512) is prepared


# Images that are passed on


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_plain_image_that_fits_is_passed_on_unchanged(kind: str) -> None:
    data = encoded(textured(), kind)
    prepared = prepare(data, LIMITS)
    assert prepared.data == data
    assert prepared.media_type == f"image/{kind}"


def test_large_png_is_encoded_as_jpeg() -> None:
    data = encoded(Image.effect_noise((1800, 1800), 90).convert("RGB"), "png", compress_level=0)
    prepared = prepare(data, Limits(10_000_000, 2000))
    assert prepared.media_type == "image/jpeg"
    assert len(prepared.data) < len(data) / 2


def test_progressive_jpeg_is_plain() -> None:
    assert is_plain(encoded(textured(), "jpeg", progressive=True), "jpeg")


def test_image_with_extra_data_is_encoded_again() -> None:
    jpeg, png = encoded(picture(), "jpeg"), encoded(picture(), "png")
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    smuggling = (
        jpeg + b"<script>alert(1)</script>",
        jpeg + jpeg,
        png + b"PK\x03\x04",
        encoded(picture(), "jpeg", exif=exif),
        encoded(picture(), "jpeg", comment=b"PK\x03\x04"),
        with_png_chunk(png, b"tEXt", b"Comment\0" + b"x" * 1000),
        with_png_chunk(png, b"eXIf", exif.tobytes()),
        encoded(picture().convert("RGBA"), "png"),
        encoded(picture().quantize(8), "png"),
        encoded(picture(), "png", save_all=True, append_images=[Image.new("RGB", (96, 64))]),
    )
    for data in smuggling:
        prepared = prepare(data, LIMITS)
        assert prepared.data != data
        assert prepared.media_type == "image/jpeg"
        assert len(prepared.data) < 20_000
        assert difference(shown(prepared), picture()) < 4
        assert is_plain(prepared.data, "jpeg")


# Animations


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff", "avif", "heic"])
def test_first_frame_is_decoded_and_all_are_counted(kind: str) -> None:
    others = [Image.new("RGB", (96, 64), color) for color in ("black", "white")]
    prepared = prepare(encoded(picture(), kind, save_all=True, append_images=others), LIMITS)
    assert prepared.facts.frames == 3
    assert difference(shown(prepared), picture()) < TOLERANCE.get(kind, 4.0)


def test_count_of_gif_frames_stops_at_the_limit() -> None:
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    data = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff" + frame * 1_000_000 + b"\x3b"
    assert count_gif_frames(data) == FRAMES_LIMIT
    assert prepare(data, LIMITS).facts.frames == FRAMES_LIMIT


def test_cyclic_tiff_pages_are_counted_once() -> None:
    data = bytearray(encoded(picture(), "tiff"))
    directory = struct.unpack_from("<I", data, 4)[0]
    entries = struct.unpack_from("<H", data, directory)[0]
    struct.pack_into("<I", data, directory + 2 + 12 * entries, directory)
    assert count_tiff_pages(bytes(data)) == 1
    assert prepare(bytes(data), LIMITS).facts.frames == 1


# Bombs


def png_bomb(width: int, height: int, content: bytes) -> bytes:
    return png_header(width, height) + png_chunk(b"IDAT", content) + png_chunk(b"IEND", b"")


def test_png_of_50000_by_50000_is_too_large() -> None:
    with pytest.raises(TooLarge):
        prepare(png_bomb(50_000, 50_000, zlib.compress(b"\0" * 10_000_000)), Limits(100_000_000, 512))


def test_declared_size_over_the_limit_is_too_large() -> None:
    jpeg = bytearray(encoded(picture(), "jpeg"))
    frame = jpeg.index(b"\xff\xc0")
    struct.pack_into(">HH", jpeg, frame + 5, 65_000, 65_000)
    bmp = bytearray(encoded(picture(), "bmp"))
    struct.pack_into("<ii", bmp, 18, 1 << 20, 1 << 20)
    gif = bytearray(encoded(picture(), "gif"))
    struct.pack_into("<HH", gif, 6, 65_535, 65_535)
    webp = (
        b"RIFF"
        + struct.pack("<I", 30)
        + b"WEBPVP8X"
        + struct.pack("<II", 10, 0)
        + b"\xff\x3f\0\xff\x3f\0"
        + b"ANMF" * 4
    )
    tiff = bytearray(encoded(picture(), "tiff"))
    for tag in (256, 257):
        struct.pack_into("<HI", tiff, tiff.index(struct.pack("<HH", tag, 4)) + 2, 4, 1)
        struct.pack_into("<I", tiff, tiff.index(struct.pack("<HH", tag, 4)) + 8, 1 << 20)
    for data in (jpeg, bmp, gif, webp, tiff):
        with pytest.raises(TooLarge):
            prepare(bytes(data), LIMITS)


def test_gif_frame_larger_than_its_screen_is_rejected() -> None:
    gif = bytearray(encoded(picture(), "gif"))
    at = gif.index(b"\x2c\0\0\0\0" + struct.pack("<HH", 96, 64))
    struct.pack_into("<HH", gif, at + 5, 65_535, 65_535)
    with pytest.raises((TooLarge, NotAnImage)):
        prepare(bytes(gif), LIMITS)


def test_zip_bomb_in_png_text_is_harmless() -> None:
    bomb = zlib.compress(b"\0" * 200_000_000, 9)
    png = encoded(picture(), "png")
    for kind, head in ((b"zTXt", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0"), (b"iCCP", b"k\0\0")):
        data = with_png_chunk(png, kind, head + bomb)
        with suppress(TooLarge):
            assert difference(shown(prepare(data, LIMITS)), picture()) < 2


# Lies and damage


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"hello",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"<?xml version='1.0'?><svg/>",
        b"%PDF-1.7",
        b"PK\x03\x04",
        b"BMW is a maker of cars, and this is a text about them.",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"II*\0",
        b"RIFF\0\0\0\0WEBP",
        bmff_box(b"ftyp", b"avif\0\0\0\0avif"),
        bmff_box(b"ftyp", b"heic\0\0\0\0mif1heic"),
        bmff_box(b"ftyp", b"isom\0\0\0\0isom"),
        b"\x00\x00\x01\x00\x01\x00",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        b"P6 1 1 255 abc",
    ],
)
def test_bytes_without_an_image_are_rejected(data: bytes) -> None:
    with pytest.raises(NotAnImage):
        prepare(data, LIMITS)


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_image_is_rejected_or_whole(kind: str) -> None:
    image = textured()
    data = encoded(image, kind)
    # Without its last bytes a file may still hold every pixel; it is then encoded anew.
    whole = shown(prepare(data, LIMITS))
    cuts = {*range(0, len(data), max(1, len(data) // 120)), *range(len(data) - 24, len(data)), *range(64)}
    for cut in sorted(cuts - {len(data)}):
        try:
            prepared = prepare(data[:cut], LIMITS)
        except (NotAnImage, TooLarge):
            continue
        bottom = (0, whole.height - 8, whole.width, whole.height)
        assert difference(shown(prepared).crop(bottom), whole.crop(bottom)) < 4, f"cut at {cut} of {len(data)}"


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_image_is_decoded_or_rejected(kind: str) -> None:
    data = encoded(textured(64, 48), kind)
    dice = random.Random(kind)
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(dice.randrange(1, 8)):
            damaged[dice.randrange(min(len(damaged), dice.choice((64, 512, 1 << 20))))] = dice.randrange(256)
        try:
            shown(prepare(bytes(damaged), LIMITS))
        except (NotAnImage, TooLarge) as error:
            assert str(error)  # noqa: PT017


def test_magic_bytes_select_the_decoder() -> None:
    for kind in FORMATS:
        for other in FORMATS:
            if kind != other:
                data = encoded(picture(), kind) + encoded(picture(), other)
                assert detect_format(data) == kind
    with pytest.raises(NotAnImage):
        prepare(b"\x89PNG\r\n\x1a\n" + encoded(picture(), "jpeg"), LIMITS)


@settings(max_examples=300)
@given(st.sampled_from([b"", *(encoded(picture(8, 8), kind)[:32] for kind in FORMATS)]), st.binary(max_size=300))
def test_random_bytes_are_decoded_or_rejected(head: bytes, rest: bytes) -> None:
    try:
        shown(prepare(head + rest, LIMITS))
    except (NotAnImage, TooLarge) as error:
        assert str(error)  # noqa: PT017


def test_jpeg_of_many_scans_is_not_plain() -> None:
    data = encoded(picture(), "jpeg", progressive=True)
    scan = data.rindex(b"\xff\xda")
    assert not is_plain(data[:scan] + data[scan:-2] * 30 + b"\xff\xd9", "jpeg")


def test_multi_picture_jpeg_decodes_its_first_picture() -> None:
    buffer = io.BytesIO()
    picture().save(buffer, "MPO", save_all=True, append_images=[Image.new("RGB", (96, 64))], quality=95)
    prepared = prepare(buffer.getvalue(), LIMITS)
    assert (prepared.facts.format, prepared.facts.frames) == ("jpeg", 2)
    assert difference(shown(prepared), picture()) < 3


_EMPTY_SCAN = bytes.fromhex("ffda0008010100013f00")


def many_scans(width: int, height: int, scans: int, *, between: bytes = b"") -> bytes:
    """A progressive JPEG with `scans` more scans than usual. They contain no data, so they hardly have bytes."""
    usual = encoded(Image.new("RGB", (width, height)), "jpeg", progressive=True)
    assert usual.endswith(b"\xff\xd9")
    return usual[:-2] + (between + _EMPTY_SCAN) * scans + b"\xff\xd9"


@pytest.mark.parametrize("between", [b"", b"garbage", b"\xff\x02", b"\xff\xff\xff", b"\xff\xfe\x00\x04\xff\xd9"])
def test_jpeg_with_many_scans_is_too_large_before_the_decode(between: bytes) -> None:
    hostile = many_scans(4000, 4000, 2000, between=between)
    start = time.process_time()
    with pytest.raises(TooLarge, match=r"^costs too much: the JPEG has 2010 scans of 250000 blocks"):
        prepare(hostile, Limits(100_000_000, 512))
    assert time.process_time() - start < 2  # decoding it takes 3 s to 25 s


def test_jpeg_with_more_markers_than_any_camera_writes_is_too_large() -> None:
    with pytest.raises(TooLarge, match=r"^costs too much:"):
        prepare(many_scans(1000, 1000, 1, between=b"\xff\x01" * 70_000), LIMITS)


def test_usual_progressive_jpeg_of_the_largest_size_is_decoded() -> None:
    data = encoded(Image.new("RGB", (10_000, 10_000)), "jpeg", progressive=True)
    assert count_jpeg_scans(data) == 10
    assert prepare(data, Limits(100_000_000, 512)).facts.width == 10_000


def test_small_jpeg_with_many_scans_is_decoded() -> None:
    assert prepare(many_scans(96, 64, 40), LIMITS).facts.width == 96


def test_scans_behind_the_end_of_the_image_do_not_count() -> None:
    usual = encoded(picture(), "jpeg", progressive=True)
    assert count_jpeg_scans(usual + _EMPTY_SCAN * 100) == count_jpeg_scans(usual) == 10
    assert count_jpeg_scans(encoded(picture(), "jpeg")) == 1
    assert count_jpeg_scans(usual[:300]) <= 1
    assert count_jpeg_scans(b"\xff\xd8") == 0

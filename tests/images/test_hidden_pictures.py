"""Files that hide a picture: the guard must see what viewers that follow the specifications show."""

import functools
import io
import struct
import zlib

import pytest
from PIL import Image, ImageOps

from services.core.errors import NotAnImage, TooLarge
from services.images.decode import prepare
from services.images.image_format import is_plain
from services.images.png_colors import read_png_colors
from tests.support.pictures import (
    LIMITS,
    color_profile,
    difference,
    encoded,
    png_chunk,
    png_header,
    shown,
    textured,
    with_late_png_chunk,
    with_png_chunk,
)

WHITE_PROFILE = color_profile([1.0] * 256)
"""Every level is white."""
STEEP_PROFILE = color_profile([0.0] * 238 + [(level / 17) ** 2.2 for level in range(18)])
"""Of levels near white, it makes a picture with full contrast."""
PROFILE_LIMIT = 4 << 20
DARK_GAMMA, BRIGHT_GAMMA, STEEP_GAMMA = (struct.pack(">I", units) for units in (500, 0x0FFFFFFF, 2_200))


@functools.cache
def secret() -> Image.Image:
    """A picture with many levels. It is random, but the same in one run."""
    return ImageOps.autocontrast(textured().convert("L")).convert("RGB")


def faint() -> Image.Image:
    """The secret picture in levels near white."""
    return secret().point([238 + level // 15 for level in range(256)] * 3)


def iccp(profile: bytes) -> bytes:
    return b"x\0\0" + zlib.compress(profile)


def contrast(image: Image.Image) -> int:
    low, high = image.convert("L").getextrema()
    assert isinstance(low, int)
    assert isinstance(high, int)
    return high - low


def seen(data: bytes) -> Image.Image:
    return shown(prepare(data, LIMITS))


def test_the_profiles_of_these_tests_hide_and_reveal() -> None:
    assert contrast(seen(with_png_chunk(encoded(secret(), "png"), b"iCCP", iccp(WHITE_PROFILE)))) < 3
    assert contrast(seen(encoded(faint(), "png"))) < 30
    assert contrast(seen(with_png_chunk(encoded(faint(), "png"), b"iCCP", iccp(STEEP_PROFILE)))) > 150
    assert contrast(seen(with_png_chunk(encoded(faint(), "png"), b"gAMA", STEEP_GAMMA))) > 150


@pytest.mark.parametrize(
    ("chunk", "content"),
    [
        (b"iCCP", iccp(WHITE_PROFILE)),
        (b"gAMA", DARK_GAMMA),
        (b"gAMA", BRIGHT_GAMMA),
        (b"tRNS", b"\0\0\0\0\0\0"),
    ],
)
@pytest.mark.parametrize("kind", ["rgb", "palette"])
def test_chunk_behind_the_pixels_hides_nothing(kind: str, chunk: bytes, content: bytes) -> None:
    plain = encoded(secret() if kind == "rgb" else secret().quantize(64), "png")
    attack = with_late_png_chunk(plain, chunk, content if kind == "rgb" or chunk != b"tRNS" else bytes(64))
    assert difference(seen(attack), seen(plain)) < 3
    assert not is_plain(attack, "png")


@pytest.mark.parametrize("chunk", [b"iCCP", b"gAMA"])
def test_colour_chunk_behind_the_palette_hides_nothing(chunk: bytes) -> None:
    plain = encoded(secret().quantize(64), "png")
    at = plain.index(b"IDAT") - 4
    content = iccp(WHITE_PROFILE) if chunk == b"iCCP" else DARK_GAMMA
    assert difference(seen(plain[:at] + png_chunk(chunk, content) + plain[at:]), seen(plain)) < 3
    assert contrast(seen(with_png_chunk(plain, chunk, content))) < 60  # before the palette, it counts


def test_first_chunk_of_a_kind_counts() -> None:
    plain = encoded(secret(), "png")
    usual = with_png_chunk(with_png_chunk(plain, b"gAMA", BRIGHT_GAMMA), b"gAMA", struct.pack(">I", 45_455))
    assert difference(seen(usual), seen(plain)) < 3
    srgb = color_profile([(level / 255) ** 2.2 for level in range(256)])
    profiles = with_png_chunk(with_png_chunk(plain, b"iCCP", iccp(WHITE_PROFILE)), b"iCCP", iccp(srgb))
    assert difference(seen(profiles), seen(plain)) < 6
    key = b"\0\1\0\2\0\3"
    keys = with_png_chunk(encoded(Image.new("RGB", (32, 32)), "png"), b"tRNS", bytes(6))
    assert seen(with_png_chunk(keys, b"tRNS", key)).getpixel((5, 5)) == (0, 0, 0)


@pytest.mark.parametrize("late", [(b"sRGB", b"\0"), (b"iCCP", iccp(b"zz")), (b"iCCP", iccp(STEEP_PROFILE))])
def test_late_chunk_does_not_replace_the_gamma(late: tuple[bytes, bytes]) -> None:
    revealed = with_png_chunk(encoded(faint(), "png"), b"gAMA", STEEP_GAMMA)
    assert difference(seen(with_late_png_chunk(revealed, *late)), seen(revealed)) < 1


@pytest.mark.parametrize(
    "content",
    [
        iccp(b"garbage"),
        b"x\0\0not zlib",
        iccp(WHITE_PROFILE[:200]),
        iccp(WHITE_PROFILE[:132] + b"\xff" * 400),
        iccp(color_profile([1.0] * 256, b"GRAY")),
        b"\0\0" + zlib.compress(WHITE_PROFILE),
        b"n" * 80 + b"\0\0" + zlib.compress(WHITE_PROFILE),
    ],
)
def test_profile_that_does_not_count_neither_replaces_the_gamma_nor_is_applied(content: bytes) -> None:
    revealed = with_png_chunk(encoded(faint(), "png"), b"gAMA", STEEP_GAMMA)
    assert difference(seen(with_png_chunk(revealed, b"iCCP", content)), seen(revealed)) < 1


def test_profile_with_a_wrong_checksum_is_applied_as_in_libpng() -> None:
    packed = iccp(STEEP_PROFILE)
    data = with_png_chunk(encoded(faint(), "png"), b"iCCP", packed[:-4] + bytes(4))
    assert contrast(seen(data)) > 150


@pytest.mark.parametrize(
    ("chunk", "content"),
    [(b"gAMA", b"\x80\0\0\0"), (b"gAMA", b"\0\0\0\0"), (b"gAMA", DARK_GAMMA + b"\0"), (b"tRNS", bytes(7))],
)
def test_chunk_with_an_invalid_value_or_length_hides_nothing(chunk: bytes, content: bytes) -> None:
    plain = encoded(secret(), "png")
    assert difference(seen(with_png_chunk(plain, chunk, content)), seen(plain)) < 3


@pytest.mark.parametrize("place", ["before the palette", "more than the palette"])
def test_invalid_transparency_of_a_palette_hides_nothing(place: str) -> None:
    plain = encoded(secret().quantize(64), "png")
    at = plain.index(b"PLTE") - 4 if place == "before the palette" else plain.index(b"IDAT") - 4
    attack = plain[:at] + png_chunk(b"tRNS", bytes(64 if place == "before the palette" else 65)) + plain[at:]
    assert difference(seen(attack), seen(plain)) < 3
    valid_at = plain.index(b"IDAT") - 4
    assert contrast(seen(plain[:valid_at] + png_chunk(b"tRNS", bytes(64)) + plain[valid_at:])) == 0


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_transparent_gray_of_every_depth_is_the_one_that_viewers_take(depth: int) -> None:
    top = (1 << depth) - 1
    transparent, other = (0x1234, 0x1235) if depth == 16 else (top - 1, top) if depth > 1 else (0, 1)
    rows = b"".join(
        b"\0"
        + (
            bytes([sum(level << at for at in range(0, 8, depth))]) * depth
            if depth < 16
            else struct.pack(">H", level) * 8
        )
        for level in (transparent, other)
    )
    head = png_header(8, 2, depth=depth, color=0) + png_chunk(b"tRNS", struct.pack(">H", transparent))
    image = seen(head + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b""))
    shade = round(255 * other / top)
    assert image.getpixel((3, 0)) >= (250, 250, 250)
    assert abs(image.getpixel((3, 1))[0] - shade) < 12


def test_transparent_colour_of_sixteen_bits_is_refused() -> None:
    rows = (b"\0" + bytes([0, 0, 0, 0, 50, 7]) * 8) * 8
    head = png_header(8, 8, depth=16) + png_chunk(b"tRNS", struct.pack(">HHH", 0, 0, 50))
    with pytest.raises(NotAnImage, match="16 bits per colour"):
        prepare(head + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b""), LIMITS)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_profile_is_applied_before_the_transparency(mode: str) -> None:
    """Over white, a picture in the alpha channel shows as soon as the profile makes the colour another one."""
    space = b"GRAY" if mode == "LA" else b"RGB "
    hidden = Image.new(mode[:-1], (160, 120), "black" if mode == "LA" else (0, 0, 0))
    hidden.putalpha(secret().convert("L"))
    profile = color_profile([0.0] * 255 + [1.0], space)
    prepared = seen(with_png_chunk(encoded(hidden, "png"), b"iCCP", iccp(profile)))
    assert difference(prepared, ImageOps.invert(secret())) < 3
    inverse = color_profile([0.0] * 255 + [1.0], space)
    white = Image.new(mode[:-1], (160, 120), "white")
    white.putalpha(secret().convert("L"))
    assert contrast(seen(with_png_chunk(encoded(white, "png"), b"iCCP", iccp(inverse)))) < 6
    turned = color_profile([1.0] * 255 + [0.0], space)
    assert difference(seen(with_png_chunk(encoded(white, "png"), b"iCCP", iccp(turned))), ImageOps.invert(secret())) < 3


def jpeg_with(segments: list[bytes], image: Image.Image) -> bytes:
    data = encoded(image, "jpeg")
    return data[:2] + b"".join(b"\xff\xe2" + struct.pack(">H", len(part) + 2) + part for part in segments) + data[2:]


def icc_segment(number: int, count: int, content: bytes) -> bytes:
    return b"ICC_PROFILE\0" + bytes([number, count]) + content


HALF = len(WHITE_PROFILE) // 2


@pytest.mark.parametrize(
    "segments",
    [
        [icc_segment(1, 2, WHITE_PROFILE[:HALF]), icc_segment(1, 2, WHITE_PROFILE[HALF:])],
        [icc_segment(0, 1, WHITE_PROFILE)],
        [icc_segment(9, 1, WHITE_PROFILE)],
        [icc_segment(1, 2, WHITE_PROFILE[:HALF]), icc_segment(2, 3, WHITE_PROFILE[HALF:])],
        [icc_segment(1, 2, WHITE_PROFILE)],
    ],
)
def test_jpeg_profile_with_wrong_numbers_is_ignored_as_in_libjpeg(segments: list[bytes]) -> None:
    attack = jpeg_with(segments, secret())
    assert difference(seen(attack), secret()) < 3
    assert not is_plain(attack, "jpeg")


def test_jpeg_profile_in_numbered_segments_is_applied() -> None:
    first, second = icc_segment(1, 2, STEEP_PROFILE[:HALF]), icc_segment(2, 2, STEEP_PROFILE[HALF:])
    for segments in ([first, second], [second, first], [b"ICC_PROFILE!", first, second]):
        assert contrast(seen(jpeg_with(segments, faint()))) > 150


def test_jpeg_profile_behind_the_header_of_the_frame_is_applied_as_in_libjpeg() -> None:
    data = encoded(faint(), "jpeg")
    at = data.index(b"\xff\xda")
    part = icc_segment(1, 1, STEEP_PROFILE)
    assert contrast(seen(data[:at] + b"\xff\xe2" + struct.pack(">H", len(part) + 2) + part + data[at:])) > 150


@pytest.mark.parametrize("kind", ["jpeg", "webp", "tiff", "png"])
def test_profile_over_the_limit_is_too_large(kind: str) -> None:
    profile = color_profile([0.0] * 238 + [1.0] * 18, padding=PROFILE_LIMIT)
    if kind == "png":
        data = with_png_chunk(encoded(faint(), "png"), b"iCCP", iccp(profile))
    else:
        data = encoded(faint(), kind, icc_profile=profile)
    with pytest.raises(TooLarge, match=r"colour profile|more memory"):
        prepare(data, LIMITS)


def test_profile_below_the_limit_is_applied() -> None:
    profile = color_profile([0.0] * 238 + [(level / 17) ** 2.2 for level in range(18)], padding=PROFILE_LIMIT - 4000)
    assert contrast(seen(encoded(faint(), "webp", icc_profile=profile))) > 150


def test_png_with_more_chunks_than_any_encoder_writes_is_too_large() -> None:
    usual = encoded(secret(), "png")
    many = usual[:33] + png_chunk(b"tEXt", b"a\0") * (1 << 16) + usual[33:]
    with pytest.raises(TooLarge, match="65536 chunks"):
        prepare(many, LIMITS)


@pytest.mark.parametrize("units", [1, 15, 625_000_001])
def test_gamma_that_viewers_show_in_different_ways_is_refused(units: int) -> None:
    with pytest.raises(NotAnImage, match="gamma"):
        prepare(with_png_chunk(encoded(secret(), "png"), b"gAMA", struct.pack(">I", units)), LIMITS)


def test_valid_profile_behind_a_broken_one_counts() -> None:
    valid = with_png_chunk(encoded(faint(), "png"), b"iCCP", iccp(STEEP_PROFILE))
    assert contrast(seen(with_png_chunk(valid, b"iCCP", iccp(b"zz")))) > 150
    many = valid[:33] + png_chunk(b"iCCP", iccp(b"zz")) * 10 + valid[33:]
    with pytest.raises(TooLarge, match="broken colour profiles"):
        prepare(many, LIMITS)


def test_usual_png_is_not_copied() -> None:
    buffer = io.BytesIO()
    secret().save(buffer, "PNG", icc_profile=STEEP_PROFILE)
    data = with_png_chunk(buffer.getvalue(), b"gAMA", DARK_GAMMA)
    colors = read_png_colors(data, PROFILE_LIMIT)
    assert colors.data is data
    assert colors.profile == STEEP_PROFILE
    dropped = read_png_colors(with_late_png_chunk(data, b"gAMA", DARK_GAMMA), PROFILE_LIMIT)
    assert dropped.data == data


def test_srgb_chunk_in_the_wrong_place_is_not_plain() -> None:
    plain = with_png_chunk(encoded(secret(), "png"), b"sRGB", b"\0")
    assert is_plain(plain, "png")
    assert not is_plain(with_png_chunk(plain, b"sRGB", b"\0"), "png")
    assert not is_plain(with_late_png_chunk(encoded(secret(), "png"), b"sRGB", b"\0"), "png")

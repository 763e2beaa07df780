"""Files whose metadata would hold a decoder for seconds are refused; genuine files with large metadata are not."""

import struct
import time
from collections.abc import Callable

import pytest
from PIL import Image

from services.core.errors import TooLarge
from services.images.decode import prepare
from services.images.decoding_cost import check_gif_head, check_jpeg_head
from tests.support.pictures import FORMATS, LIMITS, difference, encoded, picture, png_chunk, shown

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow warns of every broken image

SIZE = 20_000_000
JPEG = encoded(picture(), "jpeg")
GIF = encoded(picture(), "gif")
PNG = encoded(picture(), "png")
COLORS_END = 13 + (3 << (GIF[10] & 7) + 1)


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", 2 + len(content)) + content


def in_jpeg(flood: bytes, before: bytes = b"") -> bytes:
    """The flood before the first segment with these bytes, or behind the start of the image."""
    at = JPEG.index(before) if before else 2
    return JPEG[:at] + flood * (SIZE // len(flood)) + JPEG[at:]


def in_gif(flood: bytes) -> bytes:
    return GIF[:COLORS_END] + flood * max(1, SIZE // len(flood)) + GIF[COLORS_END:]


def directory(entries: int, size: int, kind: int = 7, count: int | None = None) -> bytes:
    """A TIFF directory whose entries all refer to the same bytes, which are most of the file."""
    entry = struct.pack("<HHII", 0x9000, kind, size - 20 if count is None else count, 8)
    data = b"II*\0" + struct.pack("<IH", 8, entries) + entry * entries + b"\0\0\0\0"
    return data + bytes(max(0, size - len(data)))


def in_tiff(extra: bytes, size: int) -> bytes:
    """A TIFF with more entries in its directory, and `size` bytes."""
    data = encoded(picture(), "tiff")
    at = struct.unpack_from("<I", data, 4)[0]
    (count,) = struct.unpack_from("<H", data, at)
    entries = data[at + 2 : at + 2 + 12 * count]
    head = data[:4] + struct.pack("<I", len(data) + len(data) % 2) + data[8:] + bytes(len(data) % 2)
    new = head + struct.pack("<H", count + len(extra) // 12) + entries + extra + b"\0\0\0\0"
    return new + bytes(max(0, size - len(new)))


def tiff_of_strips(rows: int) -> bytes:
    """A TIFF of one column, with a strip for each row. `rows` is even."""
    offsets, counts = struct.pack(f"<{rows}I", *range(8, 8 + rows)), struct.pack("<I", 1) * rows
    at = 8 + rows
    fields = [(256, 1, 1), (257, 1, rows), (258, 1, 8), (259, 1, 1), (262, 1, 1), (273, rows, at), (277, 1, 1)]
    fields += [(278, 1, 1), (279, rows, at + len(offsets))]
    table = b"".join(struct.pack("<HHII", tag, 4, count, value) for tag, count, value in fields)
    start = b"II*\0" + struct.pack("<I", at + 2 * len(offsets)) + b"\x80" * rows
    return start + offsets + counts + struct.pack("<H", len(fields)) + table + b"\0\0\0\0"


def exif(kind: str) -> bytes:
    """A file whose EXIF is hostile. It takes the place of a harmless one, because the encoders read EXIF, too."""
    flood, harmless = directory(4000, 1_000_000), directory(0, 1_000_000)
    data = encoded(picture(), kind, exif=harmless)
    assert harmless in data
    return data.replace(harmless, flood)


def exif_of_jpeg() -> bytes:
    flood = directory(4000, 4_000_000)
    parts = [flood[at : at + 65_000] for at in range(0, len(flood), 65_000)]
    return JPEG[:2] + b"".join(segment(0xE1, b"Exif\0\0" + part) for part in parts) + JPEG[2:]


FLOODS: dict[str, Callable[[], bytes]] = {
    "fill bytes of a JPEG": lambda: in_jpeg(b"\xff"),
    "fill bytes before the scan of a JPEG": lambda: in_jpeg(b"\xff", b"\xff\xda"),
    "garbage in a JPEG": lambda: in_jpeg(b"\0", b"\xff\xc4"),
    "empty segments of a JPEG": lambda: in_jpeg(segment(0xE5, b"")),
    "empty comments of a JPEG": lambda: in_jpeg(segment(0xFE, b"")),
    "small profiles of a JPEG": lambda: in_jpeg(segment(0xE2, b"ICC_PROFILE\0\1\1")),
    "quantization tables of a JPEG": lambda: in_jpeg(segment(0xDB, b"\0" + b"\1" * 64)),
    "markers of a JPEG": lambda: in_jpeg(b"\xff\xd0"),
    "ends of a JPEG": lambda: in_jpeg(b"\xff\xd9"),
    "fill bytes in segments of a JPEG that Pillow does not skip": lambda: in_jpeg(segment(0xF0, b"\xff" * 65_000)),
    "comments of a GIF": lambda: in_gif(b"\x21\xfe\1a\0"),
    "a GIF with a comment of small blocks": lambda: in_gif(b"\x21\xfe" + b"\1a" * (SIZE // 2) + b"\0"),
    "a GIF whose comments follow an empty extension": lambda: in_gif(b"\x21\x01\0" + b"\x21\xfe\1a\0" * 5_000_000),
    "extensions of a GIF": lambda: in_gif(b"\x21\x01\0"),
    "loops of a GIF": lambda: in_gif(b"\x21\xff\x0bNETSCAPE2.0\3\1\0\0\0"),
    "garbage in a GIF": lambda: in_gif(b"\0"),
    "entries of a TIFF that read all bytes": lambda: in_tiff(directory(4000, 4_000_000)[10:][: 12 * 4000], 4_000_000),
    "entries of a TIFF": lambda: in_tiff(directory(60_000, 20, count=1)[10:][: 12 * 60_000], 0),
    "strips of a TIFF": lambda: tiff_of_strips(1_000_000),
    "EXIF of a PNG": lambda: PNG[:33] + png_chunk(b"eXIf", directory(4000, 1_000_000)) + PNG[33:],
    "EXIF of a WebP": lambda: exif("webp"),
    "EXIF of a JPEG in many segments": exif_of_jpeg,
}


@pytest.mark.parametrize("flood", FLOODS)
def test_flood_is_too_large_before_it_costs_time(flood: str) -> None:
    """Without the limits, these take between one second and hours."""
    data = FLOODS[flood]()
    began_s = time.process_time()
    with pytest.raises(TooLarge, match=r"^costs too much: "):
        prepare(data, LIMITS)
    assert time.process_time() - began_s < 0.5


@pytest.mark.parametrize("kind", ["avif", "heic"])
def test_exif_of_other_formats_costs_little_time(kind: str) -> None:
    data = exif(kind)
    began_s = time.process_time()
    try:
        prepare(data, LIMITS)
    except TooLarge as error:
        assert str(error).startswith("costs too much: ")  # noqa: PT017
    assert time.process_time() - began_s < 0.5


def test_gif_with_a_flood_behind_its_frame_costs_little_time() -> None:
    data = GIF[:-1] + b"\x21\xfe\0" * (60_000_000 // 3) + b";"
    began_s = time.process_time()
    assert prepare(data, LIMITS).facts.frames == 1
    assert time.process_time() - began_s < 0.5


PROFILE = b"".join(segment(0xE2, b"ICC_PROFILE\0" + bytes([number + 1, 60]) + bytes(65_000)) for number in range(60))
XMP = b"".join(segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(65_000)) for _ in range(250))
PHOTOSHOP = b"".join(segment(0xED, b"Photoshop 3.0\0" + bytes(65_000)) for _ in range(100))
THUMBNAILS = b"".join(segment(0xE0, b"JFXX\0\x10" + JPEG[2:1000]) for _ in range(3))


@pytest.mark.parametrize(
    "metadata",
    [PROFILE, XMP, PHOTOSHOP, THUMBNAILS, b"\xff" * 65_536, b"".join(segment(0xEF, bytes(9)) for _ in range(1000))],
    ids=["profile of 60 segments", "extended XMP", "Photoshop", "previews", "padding", "a thousand segments"],
)
def test_jpeg_with_large_metadata_is_decoded(metadata: bytes) -> None:
    film = b"\0\0\0\x18ftypmp42" + bytes(5_000_000)  # a Motion Photo has its film behind the picture
    data = JPEG[:2] + metadata + JPEG[2:] + film
    assert difference(shown(prepare(data, LIMITS)), picture()) < 2


def test_gif_with_large_metadata_is_decoded() -> None:
    xmp = b"\x21\xff\x0bXMP DataXMP" + b"".join(b"\xff" + b"x" * 255 for _ in range(8000)) + b"\0"
    comment = b"\x21\xfe" + b"".join(b"\xff" + b"c" * 255 for _ in range(400)) + b"\0"
    loop = b"\x21\xff\x0bNETSCAPE2.0\3\1\0\0\0"
    data = GIF[:COLORS_END] + xmp + loop + comment + GIF[COLORS_END:]
    assert difference(shown(prepare(data, LIMITS)), picture()) < 4


def test_tiff_of_many_strips_is_decoded() -> None:
    assert prepare(tiff_of_strips(20_000), LIMITS).facts.height == 20_000


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "avif", "heic", "tiff"])
def test_large_exif_is_read(kind: str) -> None:
    data = Image.Exif()
    data[0x0112] = 3
    data[0x927C] = bytes(50_000)
    stored = picture().transpose(Image.Transpose.ROTATE_180)
    prepared = prepare(encoded(stored, kind, exif=data.tobytes()), LIMITS)
    assert difference(shown(prepared), picture()) < 6


@pytest.mark.parametrize("kind", FORMATS)
def test_checks_accept_every_cut_of_a_usual_file(kind: str) -> None:
    data = encoded(picture(), kind)
    for end in range(0, len(data), 7):
        check_jpeg_head(data[:end])
        check_gif_head(data[:end])

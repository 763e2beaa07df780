"""Known pictures, in every format, and how to compare what becomes of them."""

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import pillow_heif
from PIL import Image, ImageChops, ImageStat

from services.core.values import PreparedImage
from services.images.decode import Limits

pillow_heif.register_heif_opener()

LIMITS = Limits(image_px=10_000_000, side_px=512)
QUADRANTS = ((220, 30, 30), (30, 200, 40), (40, 60, 210), (230, 220, 60))
"""Upper left, upper right, lower left, lower right: no two orientations look the same."""

FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    "png": ("PNG", {}),
    "webp": ("WEBP", {"lossless": True}),
    "gif": ("GIF", {}),
    "bmp": ("BMP", {}),
    "tiff": ("TIFF", {}),
    "avif": ("AVIF", {"quality": 95, "subsampling": "4:4:4"}),
    "heic": ("HEIF", {"quality": 95}),
}


def picture(width: int = 96, height: int = 64) -> Image.Image:
    """RGB: four quadrants in four colours."""
    image = Image.new("RGB", (width, height))
    half_width, half_height = width // 2, height // 2
    for index, color in enumerate(QUADRANTS):
        corner = (index % 2 * half_width, index // 2 * half_height)
        image.paste(color, (*corner, corner[0] + half_width, corner[1] + half_height))
    return image


def textured(width: int = 160, height: int = 120) -> Image.Image:
    """RGB: enough detail that an encoded file has many bytes to cut."""
    noise = Image.effect_noise((width // 4, height // 4), 60).resize((width, height), Image.Resampling.BICUBIC)
    return Image.merge("RGB", (noise, noise.transpose(Image.Transpose.FLIP_LEFT_RIGHT), noise.rotate(180)))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The image in one of `FORMATS`."""
    name, defaults = FORMATS[kind]
    buffer = io.BytesIO()
    image.save(buffer, name, **(defaults | options))
    return buffer.getvalue()


def shown(prepared: PreparedImage) -> Image.Image:
    """What the guard would see."""
    image = Image.open(io.BytesIO(prepared.data))
    assert image.mode == "RGB"
    assert image.size == (prepared.width, prepared.height)
    assert image.format == prepared.media_type.removeprefix("image/").upper()
    image.load()
    return image


def difference(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference of the levels, 0..255."""
    assert one.size == other.size
    means = ImageStat.Stat(ImageChops.difference(one.convert("RGB"), other.convert("RGB"))).mean
    return float(sum(means) / len(means))


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def with_png_chunk(data: bytes, kind: bytes, content: bytes) -> bytes:
    """A PNG file with a chunk more, right after its header."""
    return data[:33] + png_chunk(kind, content) + data[33:]


def png_header(width: int, height: int, depth: int = 8, color: int = 2) -> bytes:
    """The beginning of a PNG file of any size."""
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))


def bmff_box(kind: bytes, content: bytes) -> bytes:
    """One box of an ISO base media file (AVIF, HEIC)."""
    return struct.pack(">I", 8 + len(content)) + kind + content


def with_late_png_chunk(data: bytes, kind: bytes, content: bytes) -> bytes:
    """A PNG file with a chunk more, behind its pixels."""
    at = data.rindex(b"IEND") - 4
    return data[:at] + png_chunk(kind, content) + data[at:]


def color_profile(levels: Sequence[float], space: bytes = b"RGB ", padding: int = 0) -> bytes:
    """An ICC profile of space RGB or GRAY that shows level i * 255 / (n - 1) as linear light levels[i]."""
    table = b"".join(struct.pack(">H", round(level * 65535)) for level in levels)
    curve = b"curv\0\0\0\0" + struct.pack(">I", len(levels)) + table

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">iii", *(round(value * 65536) for value in values))

    white = (0.9642, 1.0, 0.8249)
    tags = [
        (b"desc", b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(78)),
        (b"wtpt", xyz(*white)),
        (b"cprt", b"text\0\0\0\0x\0" + bytes(padding)),
    ]
    if space == b"GRAY":
        tags.append((b"kTRC", curve))
    else:
        tags += [(b"rXYZ", xyz(0.4361, 0.2225, 0.0139)), (b"gXYZ", xyz(0.3851, 0.7169, 0.0971))]
        tags += [(b"bXYZ", xyz(0.1431, 0.0606, 0.7141)), (b"rTRC", curve), (b"gTRC", curve), (b"bTRC", curve)]
    body = directory = b""
    for name, content in tags:
        directory += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    header = struct.pack(">I4xI", 132 + len(directory) + len(body), 0x02400000) + b"mntr" + space + b"XYZ " + bytes(12)
    header += b"acsp" + bytes(28) + xyz(*white)[8:] + bytes(48)
    return header + struct.pack(">I", len(tags)) + directory + body

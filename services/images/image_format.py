"""Detects an image's format from its bytes, counts frames or pages, and finds files that contain only a picture.

These functions read headers only. Their cost is limited by `FRAMES_LIMIT` or by one pass over the bytes.
"""

import re
import struct
from typing import Final, Literal

Format = Literal["jpeg", "png", "webp", "gif", "bmp", "tiff", "avif", "heic"]

FRAMES_LIMIT: Final = 10_000
"""The count of frames or pages stops here. Only the first one is decoded."""

_MAGIC: Final[tuple[tuple[bytes, Format], ...]] = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"II+\0", "tiff"),
    (b"MM\0+", "tiff"),
)
_AVIF_BRANDS: Final = frozenset({b"avif", b"avis"})
_HEIC_BRANDS: Final = frozenset(
    {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1"}
)
_GIF_BLOCKS_LIMIT: Final = 1 << 20
"""A block has up to 255 bytes."""
_BRANDS_LIMIT_BYTES: Final = 256
"""Brands behind this offset are not read."""

_PLAIN_PNG_CHUNKS: Final = frozenset({b"IHDR", b"IDAT", b"IEND", b"pHYs", b"sRGB"})
_PLAIN_JPEG_SEGMENTS: Final = frozenset({0xC0, 0xC1, 0xC2, 0xC4, 0xDB, 0xDD, 0xE0})
_JPEG_SCANS_LIMIT: Final = 16
"""A usual progressive JPEG has 10 scans. Each scan costs a pass over the picture."""
_SCAN_END_PATTERN: Final = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_JPEG_MARKERS_LIMIT: Final = 1 << 16
"""The count of scans stops after this many markers. No camera and no editor writes as many."""


def detect_format(data: bytes) -> Format | None:
    """Return the format by the magic bytes; None if Sluice does not support it."""
    for magic, kind in _MAGIC:
        if data.startswith(magic):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[4:8] == b"ftyp":
        end = min(int.from_bytes(data[:4]), _BRANDS_LIMIT_BYTES)
        brands = {data[8:12]} | {data[at : at + 4] for at in range(16, end, 4)}
        if brands & _AVIF_BRANDS:
            return "avif"
        if brands & _HEIC_BRANDS:
            return "heic"
    return None


def read_webp_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height from a WebP header, because Pillow allocates the pixels when it opens the file."""
    kind = data[12:16]
    if kind == b"VP8X" and len(data) >= 30:
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8 " and len(data) >= 30:
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and len(data) >= 25:
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return None


def count_gif_frames(data: bytes) -> int:
    """Count the frames of a GIF file up to `FRAMES_LIMIT`, without a decode. The bytes may be truncated.

    It counts no frames behind the first `_GIF_BLOCKS_LIMIT` blocks.
    """
    frames, left = 0, _GIF_BLOCKS_LIMIT
    at = 13 + _read_color_table_size(data, 10)
    while frames < FRAMES_LIMIT and left and at < len(data):
        introducer = data[at]
        if introducer == 0x2C:
            frames += 1
            at += 11 + _read_color_table_size(data, at + 9)
        elif introducer == 0x21:
            at += 2
        else:
            break
        while left and at < len(data) and data[at]:
            at += data[at] + 1
            left -= 1
        at += 1
        left -= left > 0
    return frames


def _read_color_table_size(data: bytes, flags_at: int) -> int:
    flags = data[flags_at] if flags_at < len(data) else 0
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def count_tiff_pages(data: bytes) -> int:
    """Count the pages of a TIFF or BigTIFF file up to `FRAMES_LIMIT`, from directory to directory."""
    order = "<" if data[:1] == b"I" else ">"
    if data[2:4] in (b"+\0", b"\0+"):
        first_at, offset_form, count_form, entry_bytes = 8, f"{order}Q", f"{order}Q", 20
    else:
        first_at, offset_form, count_form, entry_bytes = 4, f"{order}I", f"{order}H", 12
    seen: set[int] = set()
    at = first_at
    try:
        while len(seen) < FRAMES_LIMIT:
            (directory,) = struct.unpack_from(offset_form, data, at)
            if directory == 0 or directory in seen:
                break
            (entries,) = struct.unpack_from(count_form, data, directory)
            seen.add(directory)
            at = directory + struct.calcsize(count_form) + entries * entry_bytes
    except (struct.error, OverflowError):
        pass  # a directory is outside of the file: return the count so far
    return len(seen)


def count_jpeg_scans(data: bytes) -> int:
    """Count the scans that libjpeg would decode in a JPEG file, without a decode. The bytes may be hostile.

    It finds markers as libjpeg does, also behind garbage, and stops at the first end of image. A file with more than
    `_JPEG_MARKERS_LIMIT` markers counts that many scans.
    """
    at, scans = 2, 0
    for _ in range(_JPEG_MARKERS_LIMIT):
        found = _SCAN_END_PATTERN.search(data, at)
        if found is None:
            return scans
        marker = data[found.start() + 1]
        at = found.end()
        if marker == 0xD9:
            return scans
        scans += marker == 0xDA
        # libjpeg skips markers below 0xC0 in the data of a scan, without a length, and rejects them elsewhere.
        if marker >= 0xC0 and marker != 0xD8:
            at += max(2, int.from_bytes(data[at : at + 2]))
    return _JPEG_MARKERS_LIMIT


def is_plain(data: bytes, kind: Format) -> bool:
    """Whether a JPEG or PNG contains only a picture, so that every reader shows the same picture.

    No EXIF, no colour profile, no text, no second picture, nothing after the end, no excess of bytes or scans.
    """
    if kind == "png":
        return _is_plain_png(data)
    return kind == "jpeg" and _is_plain_jpeg(data)


def _is_plain_png(data: bytes) -> bool:
    if data[12:16] != b"IHDR" or data[24:26] != b"\x08\x02":  # 8-bit RGB; Pillow shows 16-bit RGB as the same mode
        return False
    at = 8
    seen: set[bytes] = set()
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4])
        chunk = data[at + 4 : at + 8]
        at += 12 + length
        if chunk not in _PLAIN_PNG_CHUNKS or (chunk != b"IDAT" and length > 64):
            return False
        if chunk == b"sRGB" and not seen.isdisjoint({b"sRGB", b"IDAT"}):  # readers differ in the one that counts
            return False
        seen.add(chunk)
        if chunk == b"IEND":
            return at == len(data)
    return False


def _is_plain_jpeg(data: bytes) -> bool:
    at, scans = 2, 0
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
        if marker == 0xDA:
            scans += 1
            end = _SCAN_END_PATTERN.search(data, at)
            if end is None or scans > _JPEG_SCANS_LIMIT:
                return False
            at = end.start()
            if data[at + 1] == 0xD9:
                return at + 2 == len(data)
        elif marker not in _PLAIN_JPEG_SEGMENTS:
            return False
    return False

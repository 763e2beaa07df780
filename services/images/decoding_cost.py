"""Refuses files whose metadata would hold a decoder for seconds, before it decodes them.

Pillow reads the segments of a JPEG, the extensions of a GIF and the directories of TIFF and EXIF in Python. Some
megabytes of them take seconds or minutes. No camera and no editor writes files near these limits: profiles, XMP,
previews and films are large, so they are in few and large segments.

The functions walk through a file as Pillow does, also through invalid parts of it.
"""

import re
import struct
from typing import IO, Final

from PIL.TiffImagePlugin import ImageFileDirectory_v2

from services.core.errors import TooLarge

_JPEG_SEGMENTS_LIMIT: Final = 4096
"""As many segments can have 256 MiB. A profile or XMP of 16 MiB has 260."""
_FILLING_LIMIT_BYTES: Final = 256 << 10
"""Of bytes that belong to nothing."""
_JPEG_BARE_MARKERS: Final = frozenset({0x01, 0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)})
"""Pillow reads no length behind these."""
_MARKER_PATTERN: Final = re.compile(rb"\xff[^\x00\xff]")
_SCAN: Final = 0xDA

_GIF_BLOCKS_LIMIT: Final = 1 << 17
"""Of all extensions before the first frame. A block has up to 255 bytes."""
_GIF_COMMENT_BLOCKS_LIMIT: Final = 2048
"""Pillow copies the whole comment for each of its blocks."""
_EXTENSION, _FRAME, _TRAILER = b"!,;"
_COMMENT, _APPLICATION = 0xFE, 0xFF

_DIRECTORY_ENTRIES_LIMIT: Final = 4096
_DIRECTORY_NUMBERS_LIMIT: Final = 200_000
"""Numbers in all values of a TIFF or EXIF directory. A TIFF has two for each strip, so it can have 100,000 strips."""
_DIRECTORY_READ_LIMIT_BYTES: Final = 64 << 20
"""Entries may refer to the same bytes, which are read for each of them. Twice the size of the file is allowed, too."""
_BYTE_TYPES: Final = frozenset({1, 2, 6, 7})

_load_directory: Final = ImageFileDirectory_v2.load


def check_jpeg_head(data: bytes) -> None:
    """Check what a JPEG has before its first scan.

    Raises:
        TooLarge: it has too many segments, or too many bytes outside of them.
    """
    at, filling = 2, 0
    for _ in range(_JPEG_SEGMENTS_LIMIT):
        found = _MARKER_PATTERN.search(data, at, at + _FILLING_LIMIT_BYTES + 2)
        filling += (found.start() if found else len(data)) - at
        if filling > _FILLING_LIMIT_BYTES:
            raise TooLarge(f"costs too much: the JPEG has more than {_FILLING_LIMIT_BYTES} bytes between its segments")
        if found is None or data[found.end() - 1] == _SCAN:
            return
        at = found.end()
        if data[at - 1] not in _JPEG_BARE_MARKERS:
            at += max(2, int.from_bytes(data[at : at + 2]))
    raise TooLarge(f"costs too much: the JPEG has more than {_JPEG_SEGMENTS_LIMIT} segments before its first scan")


def check_gif_head(data: bytes) -> None:
    """Check what a GIF has before its first frame.

    Raises:
        TooLarge: its extensions have too many blocks, or it has too many bytes outside of extensions.
    """
    at = 13 + (3 << (data[10] & 7) + 1 if len(data) > 10 and data[10] & 0x80 else 0)
    blocks = comment_blocks = filling = 0
    while at < len(data) and data[at] not in (_FRAME, _TRAILER):
        if data[at] != _EXTENSION:
            at += 1
            filling += 1
        else:
            label = data[at + 1] if at + 1 < len(data) else 0
            at += 2
            before = blocks
            if label != _COMMENT:  # Pillow goes on behind these blocks, even if one of them is the last one
                is_loop = label == _APPLICATION and data.startswith(b"NETSCAPE2.0", at + 1)
                for _ in range(1 + is_loop):
                    at += 1 + (data[at] if at < len(data) else 0)
            while at < len(data) and data[at] and blocks <= _GIF_BLOCKS_LIMIT:
                at += 1 + data[at]
                blocks += 1
            at += 1
            blocks += 1
            if label == _COMMENT:
                comment_blocks += blocks - before
        if blocks > _GIF_BLOCKS_LIMIT or comment_blocks > _GIF_COMMENT_BLOCKS_LIMIT or filling > _FILLING_LIMIT_BYTES:
            raise TooLarge("costs too much: the GIF has too many blocks of extensions before its first frame")


def limit_directories() -> None:
    """Have Pillow refuse directories of TIFF and EXIF, in files of any format, that cost too much to read.

    They then raise TooLarge.
    """
    ImageFileDirectory_v2.load = _load_checked  # type: ignore[assignment,method-assign]


def _load_checked(directory: ImageFileDirectory_v2, fp: IO[bytes]) -> None:
    _check_directory(directory, fp)
    _load_directory(directory, fp)


def _check_directory(directory: ImageFileDirectory_v2, fp: IO[bytes]) -> None:
    start = fp.tell()
    file_bytes = fp.seek(0, 2)
    fp.seek(start)
    order = "<" if directory._endian == "<" else ">"
    count_form, form, inline = ("Q", "HHQQ", 8) if directory._bigtiff else ("H", "HHLL", 4)
    head = fp.read(struct.calcsize(order + count_form))
    entries = int.from_bytes(head, "little" if order == "<" else "big")
    table = fp.read(min(entries, _DIRECTORY_ENTRIES_LIMIT + 1) * struct.calcsize(order + form))
    fp.seek(start)
    table = table[: len(table) // struct.calcsize(order + form) * struct.calcsize(order + form)]
    read = numbers = count = 0
    for _, kind, length, offset in struct.iter_unpack(order + form, table):
        count += 1
        unit, _ = directory._load_dispatch.get(kind, (0, None))
        size = unit * length
        if size > inline:
            size = min(size, max(0, file_bytes - offset))
            read += size
        if unit and kind not in _BYTE_TYPES:
            numbers += size // unit
    if (
        count > _DIRECTORY_ENTRIES_LIMIT
        or numbers > _DIRECTORY_NUMBERS_LIMIT
        or read > _DIRECTORY_READ_LIMIT_BYTES + 2 * file_bytes
    ):
        raise TooLarge("costs too much: a directory of TIFF or EXIF has too many entries or values")

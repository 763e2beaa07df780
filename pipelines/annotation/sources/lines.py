"""Reads a range of a file of JSON lines. Several workers can read one large file."""

from collections.abc import Iterator
from typing import BinaryIO, Final

LINE_LIMIT_BYTES: Final = 1 << 20


def read_lines(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    """The lines that begin in a range of a file, without empty ones. A line over the limit is cut one byte after it."""
    file.seek(max(0, start - 1))
    if start:
        _skip_line(file)
    while file.tell() < end:
        line = file.readline(LINE_LIMIT_BYTES + 1)
        if len(line) > LINE_LIMIT_BYTES and not line.endswith(b"\n"):
            _skip_line(file)
        if line.strip():
            yield line


def _skip_line(file: BinaryIO) -> None:
    while (part := file.readline(LINE_LIMIT_BYTES)) and not part.endswith(b"\n"):
        pass

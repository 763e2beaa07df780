"""Reads WebDataset tars from end to end, without unpacking them. Names of members are never used as paths."""

import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from tarfile import InvalidHeaderError, ReadError  # type: ignore[attr-defined]  # typeshed lacks the first one
from typing import BinaryIO, Final, Self

_IMAGE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif")
"""Members with these suffixes are images. Other members with the same key describe the image."""

_SIDECAR_LIMIT_BYTES: Final = 65_536
_SIDECARS_LIMIT: Final = 16
_PADDING_LIMIT_BYTES: Final = 1 << 20
"""Tars end with empty blocks, which fill a record of 10 KB or, on tapes, up to some hundred KB."""
_PADDING_READ_BYTES: Final = 1 << 16
_HEADERS_LIMIT_BYTES: Final = 131_072
"""The headers of one member (long names, pax records, maps of sparse files). They have some KB at most."""


@dataclass(slots=True)
class TarImage:
    """An image in a tar."""

    name: str
    offset: int
    size: int
    rejection: str | None = None
    """Why the image is not read; None if it is."""
    truncated: bool = False
    """Whether the tar ends in the middle of the image."""
    sidecars: dict[str, object] = field(default_factory=dict)
    """The content of the other members with the same key (in WebDataset, the fields of a sample), by suffix."""


class TruncatedTar(Exception):
    """The tar is cut off or corrupt. The message has the number of members before that."""


class _StrictTarInfo(tarfile.TarInfo):
    """A member whose header must be valid. By default, tarfile ends silently at an invalid header behind the first."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:  # the argument's name in the base class
        try:
            return super().fromtarfile(tarfile)
        except InvalidHeaderError as error:
            raise ReadError(f"the header of a member is invalid: {error}") from None


class _HeaderReader(io.RawIOBase):
    """Reads the headers of a tar. A header may claim any size, and tarfile would allocate that."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self._remaining = _HEADERS_LIMIT_BYTES

    def begin_member(self) -> None:
        """Allow the headers of another member."""
        self._remaining = _HEADERS_LIMIT_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= self._remaining:
            raise tarfile.ReadError("the headers of a member are too large")
        self._remaining -= size
        return self._file.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def read_tar(file: BinaryIO) -> Iterator[TarImage]:
    """The images of a tar, in their order.

    Raises:
        TruncatedTar: after the last member that is readable.
    """
    size, count = file.seek(0, os.SEEK_END), 0
    file.seek(0)
    images, key = list[TarImage](), None
    sidecars: dict[str, object] = {}

    def finish_sample() -> Iterator[TarImage]:
        for image in images:
            image.sidecars = sidecars
            yield image

    reason = ""
    try:
        headers = _HeaderReader(file)
        with tarfile.open(fileobj=headers, mode="r:", tarinfo=_StrictTarInfo, errorlevel=2) as tar:
            end = -1
            for info in tar:
                if info.size < 0 or tar.offset <= end:  # else a tar could be read in a circle
                    raise tarfile.ReadError("a member does not end behind its beginning")
                end = tar.offset
                headers.begin_member()
                tar.members.clear()  # type: ignore[attr-defined]  # else tarfile keeps every member in memory
                stem, suffix = _split_name(info.name)
                if stem != key:
                    yield from finish_sample()
                    images, key, sidecars = [], stem, {}
                if suffix.endswith(_IMAGE_SUFFIXES) and not info.isdir():
                    image = TarImage(info.name, info.offset_data, min(info.size, size), _find_rejection(info))
                    image.truncated = info.isreg() and info.offset_data + info.size > size
                    images.append(image)
                elif info.isreg() and suffix and info.size <= _SIDECAR_LIMIT_BYTES and len(sidecars) < _SIDECARS_LIMIT:
                    content = tar.extractfile(info)
                    sidecars[suffix.removeprefix(".")] = _decode_sidecar(suffix, content.read() if content else b"")
                    headers.begin_member()
                count += 1
            end = tar.offset
        if _has_members_behind(file, end):
            reason = f"the tar has members behind its end, which comes after {count} members"
        elif size % tarfile.BLOCKSIZE or (count == 0 and size == 0):
            reason = f"the tar is cut off after {count} members"
    except (tarfile.TarError, EOFError, ValueError, OverflowError, LookupError, MemoryError, RecursionError) as error:
        reason = f"the tar cannot be read beyond {count} members: {error}"
    yield from finish_sample()
    if reason:
        raise TruncatedTar(reason)


def _has_members_behind(file: BinaryIO, end: int) -> bool:
    """Return whether the first block that is not empty behind the end of a tar is the header of a member.

    Two tars in one file look like this. Padding is at most `_PADDING_LIMIT_BYTES` long.
    """
    file.seek(end)
    for _ in range(_PADDING_LIMIT_BYTES // _PADDING_READ_BYTES):
        data = file.read(_PADDING_READ_BYTES)
        for start in range(0, len(data) - tarfile.BLOCKSIZE + 1, tarfile.BLOCKSIZE):
            block = data[start : start + tarfile.BLOCKSIZE]
            if any(block):
                try:
                    tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
                except tarfile.TarError:
                    return False
                return True
        if len(data) < _PADDING_READ_BYTES:
            return False
    return False


def _split_name(name: str) -> tuple[str, str]:
    """WebDataset's key of a member, and its suffix, which begins at the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    return f"{folder}{slash}{stem}", (dot + suffix).lower()


def _find_rejection(info: tarfile.TarInfo) -> str | None:
    if PurePosixPath(info.name).is_absolute() or ".." in info.name.split("/") or "\0" in info.name:
        return "the member's name points outside the tar"
    return None if info.isreg() else "the member is not a plain file"


def _decode_sidecar(suffix: str, content: bytes) -> object:
    text = content.decode(errors="replace")
    if suffix.endswith(".json"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            pass
    return text

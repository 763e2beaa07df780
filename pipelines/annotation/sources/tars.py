"""Reads WebDataset tars from end to end, without unpacking anything: the names in them are text and nothing else."""

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import BinaryIO, Final

IMAGES: Final = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif")
"""Members with these endings are images; the others with the same key describe them."""

_NOTE_LIMIT_BYTES: Final = 65_536
_NOTES_LIMIT: Final = 16


@dataclass(slots=True)
class Member:
    """An image in a tar, or why it cannot be read."""

    name: str
    offset: int
    size: int
    refused: str | None = None
    """Why it is not read."""
    cut: bool = False
    """Whether the tar ends before the member does."""
    notes: dict[str, object] = field(default_factory=dict)
    """What the members with the same key say that are no images, by their endings."""


class Cut(Exception):
    """The tar ends in the middle, or goes on with something else. The text says after how many members."""


def members(file: BinaryIO) -> Iterator[Member]:
    """The images of a tar, in their order.

    Raises:
        Cut: after the last member that can be read.
    """
    size, count = file.seek(0, os.SEEK_END), 0
    file.seek(0)
    sample, key = list[Member](), None
    notes: dict[str, object] = {}

    def finished() -> Iterator[Member]:
        for member in sample:
            member.notes = notes
            yield member

    reason = ""
    try:
        with tarfile.open(fileobj=file, mode="r:", errorlevel=2) as tar:
            for info in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # else it remembers every one of them
                stem, ending = _parts(info.name)
                if stem != key:
                    yield from finished()
                    sample, key, notes = [], stem, {}
                if ending.endswith(IMAGES) and not info.isdir():
                    member = Member(info.name, info.offset_data, info.size, _refused(info))
                    member.cut = info.isreg() and info.offset_data + info.size > size
                    sample.append(member)
                elif info.isreg() and ending and info.size <= _NOTE_LIMIT_BYTES and len(notes) < _NOTES_LIMIT:
                    content = tar.extractfile(info)
                    notes[ending.removeprefix(".")] = _read(ending, content.read() if content else b"")
                count += 1
        if size % tarfile.BLOCKSIZE or (count == 0 and size == 0):
            reason = f"the tar is cut off after {count} members"
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        reason = f"the tar cannot be read beyond {count} members: {error}"
    yield from finished()
    if reason:
        raise Cut(reason)


def _parts(name: str) -> tuple[str, str]:
    """WebDataset's key of a member, and its ending: what follows the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    stem, dot, ending = file.partition(".")
    return f"{folder}{slash}{stem}", (dot + ending).lower()


def _refused(info: tarfile.TarInfo) -> str | None:
    if PurePosixPath(info.name).is_absolute() or ".." in info.name.split("/") or "\0" in info.name:
        return "the member's name leads out of the tar"
    return None if info.isreg() else "the member is no plain file"


def _read(ending: str, content: bytes) -> object:
    text = content.decode(errors="replace")
    if ending.endswith(".json"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            pass
    return text

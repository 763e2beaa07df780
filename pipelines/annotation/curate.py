"""Writes what a filter keeps of the annotations: references, or tars with the images themselves."""

import asyncio
import io
import json
import tarfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

from pipelines.annotation.filters import Filter
from pipelines.annotation.image_reader import ImageReader
from pipelines.annotation.reader import annotations, parts
from pipelines.annotation.schema import Row, to_parquet
from pipelines.annotation.storage import Folder
from services.core.errors import ConfigurationError, Unjudgeable
from services.core.retry import retry_while_unavailable

MARKER: Final = "_curated.json"
_PARTS: Final = {"references": "references-", "tars": "curated-"}
_TAR_IMAGES: Final = 1_000
_TAR_BYTES: Final = 256 << 20
_READS_IN_FLIGHT: Final = 8
_DETAILS: Final = ("row", "uri", "sha256", "rating", "category", "rationale", "score", "action")
_REFERENCE: Final = {
    "submission_id": "id",
    "uri": "uri",
    "version_id": "version_id",
    "etag": "etag",
    "tenant": "tenant",
}
_KEPT: Final = ("row", "sha256", "rating", "category", "score", "action", "verdict_id")


@dataclass(frozen=True, slots=True)
class Curated:
    """What was written."""

    images: int
    files: int
    lost: int
    """Images that could not be read any more."""


def begin(folder: Folder, about: dict[str, Any]) -> None:
    """Take a folder for a curated set, an empty one or one with the same set, which is made anew.

    Raises:
        ConfigurationError: it holds something else.
    """
    kept = folder.read(MARKER)
    if kept is None:
        if (entry := next(iter(folder.entries()), None)) is not None:
            raise ConfigurationError(f"{folder.uri} is not empty (there is {entry.name}); say another --curated")
        folder.put(MARKER, json.dumps(about).encode())
    elif json.loads(kept) != about:
        raise ConfigurationError(f"{folder.uri} holds another curated set; say another --curated, or empty it")


def references(source: Folder, wanted: Filter, into: Folder, progress: Callable[[int], None]) -> Curated:
    """Write a parquet file with references for each part that has any; `sluice annotate` reads such, too."""
    images = files = 0
    for number, name in enumerate(parts(source)):
        kept = [rows for rows in _filtered(source, name, wanted) if rows.num_rows]
        if kept:
            table = pa.concat_tables(kept)
            own = [c for c in table.column_names if c.startswith("source_")]
            table = table.select([*_REFERENCE, *_KEPT, *own]).rename_columns([*_REFERENCE.values(), *_KEPT, *own])
            into.put(f"{_PARTS['references']}{number:06d}.parquet", to_parquet(table))
            images, files = images + table.num_rows, files + 1
        progress(sum(rows.num_rows for rows in kept))
    return Curated(images, files, 0)


async def tars(
    source: Folder, wanted: Filter, into: Folder, images: ImageReader, progress: Callable[[int], None]
) -> Curated:
    """Write WebDataset tars: of each image the original bytes, and what was said about it as JSON."""
    number = lost = total = 0
    tar = _Tar()
    async for row, data in _with_bytes(source, wanted, images):
        if data is None:
            lost += 1
            continue
        tar.add(row, data)
        total += 1
        if tar.images == _TAR_IMAGES or tar.size >= _TAR_BYTES:
            into.put(f"{_PARTS['tars']}{number:06d}.tar", tar.close())
            progress(tar.images)
            number, tar = number + 1, _Tar()
    if tar.images:
        into.put(f"{_PARTS['tars']}{number:06d}.tar", tar.close())
        progress(tar.images)
        number += 1
    return Curated(total, number, lost)


class _Tar:
    """A tar in memory. Names are made of row numbers: those of strangers do not get into it."""

    def __init__(self) -> None:
        self.images = 0
        self._buffer = io.BytesIO()
        self._tar = tarfile.TarFile(fileobj=self._buffer, mode="w", format=tarfile.PAX_FORMAT)

    @property
    def size(self) -> int:
        return self._buffer.tell()

    def add(self, row: Row, data: bytes) -> None:
        key = f"{row['row']:012d}"
        ending = (row["image"] or {}).get("format") or "bin"
        own = {name.removeprefix("source_"): value for name, value in row.items() if name.startswith("source_")}
        details = {name: row[name] for name in _DETAILS} | ({"source": own} if own else {})
        self._add(f"{key}.{'jpg' if ending == 'jpeg' else ending}", data)
        self._add(f"{key}.json", json.dumps(details, default=str).encode())
        self.images += 1

    def close(self) -> bytes:
        self._tar.close()
        return self._buffer.getvalue()

    def _add(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))


def _filtered(source: Folder, name: str, wanted: Filter) -> Iterator[pa.Table]:
    for rows in annotations(source, name):
        mask = [wanted.keeps(row) for row in rows.select(wanted.fields).to_pylist()]
        yield rows.filter(pa.array(mask, pa.bool_()))


async def _with_bytes(source: Folder, wanted: Filter, images: ImageReader) -> AsyncIterator[tuple[Row, bytes | None]]:
    """Each row that is kept with its image, None where that cannot be had any more."""

    async def read(row: Row) -> bytes | None:
        try:
            return await retry_while_unavailable(lambda: _read(row, images))
        except Unjudgeable:
            return None

    for name in parts(source):
        for rows in _filtered(source, name, wanted):
            kept = rows.to_pylist()
            for first in range(0, len(kept), _READS_IN_FLIGHT):
                some = kept[first : first + _READS_IN_FLIGHT]
                for row, data in zip(some, await asyncio.gather(*map(read, some)), strict=True):
                    yield row, data


async def _read(row: Row, images: ImageReader) -> bytes:
    async with images.open(row) as stored:
        return stored.data

"""Writes a curated set: the annotations that a filter selects, as references or as tars with the images."""

import asyncio
import io
import json
import tarfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

from pipelines.annotation.annotation_files import list_partition_files, read_annotations
from pipelines.annotation.filters import Filter
from pipelines.annotation.image_reader import ImageReader
from pipelines.annotation.image_row import ImageRow
from pipelines.annotation.schema import to_image_row, to_parquet
from pipelines.annotation.storage import Folder
from services.core.errors import ConfigurationError, Unjudgeable
from services.core.retry import retry_while_unavailable

MARKER: Final = "_curated.json"
_TAR_IMAGES: Final = 1_000
_TAR_BYTES: Final = 256 << 20
_READS_IN_FLIGHT: Final = 8
_TAR_COLUMNS: Final = ("row", "uri", "sha256", "rating", "category", "rationale", "score", "action")
_REFERENCE_NAMES: Final = {
    "submission_id": "id",
    "uri": "uri",
    "version_id": "version_id",
    "etag": "etag",
    "tenant": "tenant",
}
_REFERENCE_COLUMNS: Final = ("row", "sha256", "rating", "category", "score", "action", "verdict_id")


@dataclass(frozen=True, slots=True)
class CuratedSet:
    """The size of a curated set."""

    images: int
    files: int
    unreadable: int
    """Images that cannot be read any more. They are left out."""


def claim_folder(folder: Folder, description: dict[str, Any]) -> None:
    """Mark a folder as the one of a curated set. It has to be empty, or to have the same set, which is replaced.

    Raises:
        ConfigurationError: the folder has something else.
    """
    kept = folder.read(MARKER)
    if kept is None:
        if (entry := next(iter(folder.entries()), None)) is not None:
            raise ConfigurationError(
                f"{folder.uri} is not empty (it has {entry.name}); name another folder with --curated"
            )
        folder.put(MARKER, json.dumps(description).encode())
    elif json.loads(kept) != description:
        raise ConfigurationError(
            f"{folder.uri} has another curated set; name another folder with --curated, or empty this one"
        )


def write_references(
    annotations: Folder, row_filter: Filter, into: Folder, progress: Callable[[int], None]
) -> CuratedSet:
    """Write references as parquet, a file for each partition file with selected rows. `sluice annotate` reads them."""
    images = files = 0
    for number, name in enumerate(list_partition_files(annotations)):
        selected = [rows for rows in _select(annotations, name, row_filter) if rows.num_rows]
        if selected:
            table = pa.concat_tables(selected)
            source_columns = [column for column in table.column_names if column.startswith("source_")]
            table = table.select([*_REFERENCE_NAMES, *_REFERENCE_COLUMNS, *source_columns]).rename_columns(
                [*_REFERENCE_NAMES.values(), *_REFERENCE_COLUMNS, *source_columns]
            )
            into.put(f"references-{number:06d}.parquet", to_parquet(table))
            images, files = images + table.num_rows, files + 1
        progress(sum(rows.num_rows for rows in selected))
    return CuratedSet(images, files, 0)


async def write_tars(
    annotations: Folder, row_filter: Filter, into: Folder, images: ImageReader, progress: Callable[[int], None]
) -> CuratedSet:
    """Write WebDataset tars: for each image the original bytes, and its annotation as JSON."""
    files = unreadable = total = 0
    tar = _Tar()

    def finish_tar() -> None:
        nonlocal files, tar
        into.put(f"curated-{files:06d}.tar", tar.close())
        progress(tar.images)
        files, tar = files + 1, _Tar()

    async for annotation, data in _read_images(annotations, row_filter, images):
        if data is None:
            unreadable += 1
            continue
        tar.add(annotation, data)
        total += 1
        if tar.images == _TAR_IMAGES or tar.size >= _TAR_BYTES:
            finish_tar()
    if tar.images:
        finish_tar()
    return CuratedSet(total, files, unreadable)


class _Tar:
    """A tar in memory. Its names are row numbers, because names from the source are not trusted."""

    def __init__(self) -> None:
        self.images = 0
        self._buffer = io.BytesIO()
        self._tar = tarfile.TarFile(fileobj=self._buffer, mode="w", format=tarfile.PAX_FORMAT)

    @property
    def size(self) -> int:
        return self._buffer.tell()

    def add(self, annotation: Mapping[str, Any], data: bytes) -> None:
        key = f"{annotation['row']:012d}"
        suffix = (annotation["image"] or {}).get("format") or "bin"
        source_columns = {
            name.removeprefix("source_"): each for name, each in annotation.items() if name.startswith("source_")
        }
        details = {name: annotation[name] for name in _TAR_COLUMNS} | (
            {"source": source_columns} if source_columns else {}
        )
        self._add(f"{key}.{'jpg' if suffix == 'jpeg' else suffix}", data)
        self._add(f"{key}.json", json.dumps(details, default=str).encode())
        self.images += 1

    def close(self) -> bytes:
        self._tar.close()
        return self._buffer.getvalue()

    def _add(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))


def _select(annotations: Folder, name: str, row_filter: Filter) -> Iterator[pa.Table]:
    for rows in read_annotations(annotations, name):
        mask = [row_filter.keeps(row) for row in rows.select(row_filter.fields).to_pylist()]
        yield rows.filter(pa.array(mask, pa.bool_()))


async def _read_images(
    annotations: Folder, row_filter: Filter, images: ImageReader
) -> AsyncIterator[tuple[dict[str, Any], bytes | None]]:
    """Each selected annotation with its image; None if the image is not readable any more."""

    async def read(annotation: Mapping[str, Any]) -> bytes | None:
        try:
            return await retry_while_unavailable(lambda: _read(to_image_row(annotation), images))
        except Unjudgeable:
            return None

    for name in list_partition_files(annotations):
        for rows in _select(annotations, name, row_filter):
            selected = rows.to_pylist()
            for first in range(0, len(selected), _READS_IN_FLIGHT):
                batch = selected[first : first + _READS_IN_FLIGHT]
                for annotation, data in zip(batch, await asyncio.gather(*map(read, batch)), strict=True):
                    yield annotation, data


async def _read(row: ImageRow, images: ImageReader) -> bytes:
    async with images.open(row) as stored:
        return stored.data

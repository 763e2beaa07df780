"""Reads the bytes of images: objects in S3, files, members of tars, rows of tables."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, BinaryIO, Final

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.annotation.image_row import FileLocation, ImageRow
from pipelines.annotation.sources.discover import AnnotationSource, find_bucket
from pipelines.annotation.storage import local_path, open_below, open_folder
from services.core.errors import NotAnImage, ObjectChanged, TooLarge
from services.core.messages import ObjectReference
from services.core.settings import Settings
from services.core.values import StoredObject
from services.images.memory_budget import ByteBudget
from services.images.object_store import ObjectStore

_TABLE_BATCH_ROWS: Final = 64


class ImageReader:
    """Opens the images of rows. For use from one event loop; close it when done."""

    def __init__(self, settings: Settings, source: AnnotationSource) -> None:
        named = find_bucket(source.folder_uri)
        # The bucket named on the command line may be read. A list of references adds none to SLUICE_S3_BUCKETS.
        own = {named} if named and source.kind != "references" else set[str]()
        self._settings = settings
        self._limit_bytes = settings.image_limit_bytes
        self._readable = settings.model_copy(update={"s3_buckets": (*settings.s3_buckets, *own)})
        self._budget = ByteBudget(settings.image_memory_bytes)
        self._store: ObjectStore | None = None
        self._source = source
        self._tables = _TableImages(source, settings)

    @asynccontextmanager
    async def open(self, row: ImageRow) -> AsyncIterator[StoredObject]:
        """Read the image of a row. Its memory stays reserved until the context ends.

        Raises:
            Unjudgeable: the image cannot be read.
            StoreUnavailable: the object store does not answer.
        """
        place = row.place
        if place is None:
            reference = ObjectReference.from_uri(row.uri, version_id=row.version_id, etag=row.etag)
            if self._store is None:
                self._store = ObjectStore(self._readable)
            async with self._store.open(reference) as stored:
                yield stored
            return
        size = place.size or 0
        self.check_size(size)
        async with self._budget.reserve(size):
            read = self._tables.read(place) if place.group is not None else asyncio.to_thread(self._read, place)
            yield StoredObject(await read, None, None)

    def check_size(self, size: int) -> None:
        """Raises TooLarge if an image of `size` bytes exceeds the limit."""
        if size > self._limit_bytes:
            raise TooLarge(f"the image has {size} bytes or more, the limit is {self._limit_bytes}")

    def close(self) -> None:
        """Close the connections."""
        if self._store is not None:
            self._store.close()

    def _read(self, place: FileLocation) -> bytes:
        with _open_uri(place.file, self._source, self._settings) as file:
            file.seek(place.offset)
            data = file.read(self._limit_bytes + 1 if place.size is None else place.size)
        self.check_size(len(data))
        return data


def _open_uri(uri: str, source: AnnotationSource, settings: Settings) -> BinaryIO:
    """Open a file of a source by its URI; raises as `Folder.open`."""
    if not uri.startswith("s3://"):
        return open_below(local_path(uri), source.roots)
    parent, _, name = uri.rpartition("/")
    return open_folder(parent, settings).open(name)


def read_table_images(file: BinaryIO, group: int, column: str) -> Iterator[list[bytes | None]]:
    """The images of a row group, in batches; None for a row without an image."""
    for batch in pq.ParquetFile(file).iter_batches(_TABLE_BATCH_ROWS, row_groups=[group], columns=[column]):
        yield [_get_image_bytes(value) for value in batch.column(0).to_pylist()]


class _TableImages:
    """Reads images of tables in the order of their rows. Each row group is read once."""

    def __init__(self, source: AnnotationSource, settings: Settings) -> None:
        self._source = source
        self._settings = settings
        self._lock = asyncio.Lock()
        self._row_group: tuple[str, int | None] | None = None
        self._first = 0
        self._batch: list[bytes | None] = []
        self._rest: Iterator[list[bytes | None]] = iter(())

    async def read(self, place: FileLocation) -> bytes:
        async with self._lock:  # in the order of the calls
            return await asyncio.to_thread(self._read, place)

    def _read(self, place: FileLocation) -> bytes:
        row_group = (place.file, place.group)
        if row_group != self._row_group or place.offset < self._first:
            self._row_group, self._first, self._batch = row_group, 0, []
            file = _open_uri(place.file, self._source, self._settings)
            self._rest = read_table_images(file, place.group or 0, self._source.column or "")
        try:
            while place.offset >= self._first + len(self._batch):
                self._first += len(self._batch)
                self._batch = next(self._rest)
        except (StopIteration, pa.ArrowException):
            self._row_group = None
            raise ObjectChanged(f"{place.file} has changed since it was indexed") from None
        data = self._batch[place.offset - self._first]
        if data is None:
            raise NotAnImage("the row has no image")
        return data


def _get_image_bytes(value: Any) -> bytes | None:
    data = value.get("bytes") if isinstance(value, dict) else value
    return data if isinstance(data, bytes) and data else None

"""The bytes of images, wherever they stand: objects in S3, files, members of tars, rows of tables."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, BinaryIO, Final

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.annotation.schema import Row
from pipelines.annotation.sources.discover import AnnotationSource, bucket_of
from pipelines.annotation.storage import folder, local_path, open_local
from services.core.errors import Changed, NotAnImage, TooLarge
from services.core.messages import ObjectReference
from services.core.settings import Settings
from services.core.values import StoredObject
from services.images.memory_budget import ByteBudget
from services.images.object_store import ObjectStore

_ROWS_AT_A_TIME: Final = 64


class ImageReader:
    """Opens the image of a row of an index or a plan. For use from one event loop; close it when done."""

    def __init__(self, settings: Settings, source: AnnotationSource) -> None:
        named = bucket_of(source.place)
        # The bucket that is named on the command line is read; a list of strangers cannot add to SLUICE_S3_BUCKETS.
        own = {named} if named and source.kind != "references" else set[str]()
        self._settings = settings
        self._limit_bytes = settings.image_limit_bytes
        self._readable = settings.model_copy(update={"s3_buckets": (*settings.s3_buckets, *own)})
        self._budget = ByteBudget(settings.image_memory_bytes)
        self._store: ObjectStore | None = None
        self._tables = _Tables(source.column or "", settings)

    @asynccontextmanager
    async def open(self, row: Row) -> AsyncIterator[StoredObject]:
        """The image; the memory it takes stays reserved until the context ends.

        Raises:
            Unjudgeable: it cannot be had.
            StoreUnavailable: the store is away.
        """
        place = row["place"]
        if place is None:
            reference = ObjectReference.from_uri(row["uri"], version_id=row["version_id"], etag=row["etag"])
            if self._store is None:
                self._store = ObjectStore(self._readable)
            async with self._store.open(reference) as stored:
                yield stored
            return
        size = place["size"] or 0
        self.check_size(size)
        async with self._budget.reserve(size):
            read = self._tables.read(place) if place["group"] is not None else asyncio.to_thread(self._read, place)
            yield StoredObject(await read, None, None)

    def check_size(self, size: int) -> None:
        """Raises TooLarge."""
        if size > self._limit_bytes:
            raise TooLarge(f"the image has {size} bytes or more, the limit is {self._limit_bytes}")

    def close(self) -> None:
        """Release the connections."""
        if self._store is not None:
            self._store.close()

    def _read(self, place: Row) -> bytes:
        with open_uri(place["file"], self._settings) as file:
            file.seek(place["offset"])
            data = file.read(self._limit_bytes + 1 if place["size"] is None else place["size"])
        self.check_size(len(data))
        return data


def open_uri(uri: str, settings: Settings) -> BinaryIO:
    """A file by its URI; raises as `Folder.open`."""
    if not uri.startswith("s3://"):
        return open_local(local_path(uri))
    parent, _, name = uri.rpartition("/")
    return folder(parent, settings).open(name)


def table_images(file: BinaryIO, group: int, column: str) -> Iterator[list[bytes | None]]:
    """The images of a row group, some at a time; None where a row has none."""
    for batch in pq.ParquetFile(file).iter_batches(_ROWS_AT_A_TIME, row_groups=[group], columns=[column]):
        yield [_bytes(value) for value in batch.column(0).to_pylist()]


class _Tables:
    """Reads images of tables in the order of their rows, so that a row group is read once."""

    def __init__(self, column: str, settings: Settings) -> None:
        self._column = column
        self._settings = settings
        self._turn = asyncio.Lock()
        self._at: tuple[str, int] | None = None
        self._first = 0
        self._batch: list[bytes | None] = []
        self._rest: Iterator[list[bytes | None]] = iter(())

    async def read(self, place: Row) -> bytes:
        async with self._turn:  # first come, first served
            return await asyncio.to_thread(self._read, place)

    def _read(self, place: Row) -> bytes:
        at, row = (place["file"], place["group"]), place["offset"]
        if at != self._at or row < self._first:
            self._at, self._first, self._batch = at, 0, []
            self._rest = table_images(open_uri(place["file"], self._settings), place["group"], self._column)
        try:
            while row >= self._first + len(self._batch):
                self._first += len(self._batch)
                self._batch = next(self._rest)
        except (StopIteration, pa.ArrowException):
            self._at = None
            raise Changed(f"{place['file']} is not what it was") from None
        data: bytes | None = self._batch[row - self._first]
        if data is None:
            raise NotAnImage("the row has no image")
        return data


def _bytes(value: Any) -> bytes | None:
    data = value.get("bytes") if isinstance(value, dict) else value
    return data if isinstance(data, bytes) and data else None

"""Divides an index into chunks: rows in the order of the source, each duplicate in the chunk of the first such image.

A chunk is judged and stored as a whole. A row whose image occurred before goes into the chunk of the first row with the
same bytes, so a worker judges each image once without knowing other chunks. Digests are sorted in a temporary file of
SQLite (in SQLITE_TMPDIR, else TMPDIR; about 100 bytes for each image, twice that while they are sorted), so memory does
not grow with the source.
"""

import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from typing import Final, Self

import pyarrow as pa

from pipelines.annotation.image_row import PLAN, ImageRow, PlannedImage
from pipelines.annotation.schema import BATCH_ROWS, ParquetBuffer, add_source_columns, to_parquet
from services.core.temporary_database import open_temporary_database

_CACHE_KIB: Final = 65_536
_CHUNK_ROWS: Final = (50, 5_000)
"""The least and the most rows of a chunk, unless the number is given."""
_CHUNKS: Final = 10_000

ReadIndex = Callable[[], Iterable[pa.Table]]
WriteChunk = Callable[[str, int, bytes], None]
"""Takes the name of a file of the plan, its number of rows, and its content as parquet."""


@dataclass(frozen=True, slots=True)
class AnnotationPlan:
    """The size of a run."""

    rows: int
    chunks: int
    chunk_rows: int
    duplicates: int
    unreadable: int


def choose_chunk_rows(rows: int) -> int:
    """The rows of a chunk for a source of `rows` rows. Large sources get at most some thousands of chunks."""
    return min(max(rows // _CHUNKS, _CHUNK_ROWS[0]), _CHUNK_ROWS[1])


def plan_chunks(
    read_index: ReadIndex, source_columns: pa.Schema, write: WriteChunk, per_chunk: int | None = None
) -> AnnotationPlan:
    """Write the chunks. The same index always gives the same chunks.

    Chunk 123 is the file `000123`. Duplicates from later chunks are in a second file, `000123-late`.

    Args:
        read_index: returns the index. It is called twice and has to return the same tables.
        source_columns: the source's own columns.
        write: writes a file of the plan.
        per_chunk: rows of a chunk; None to choose them by the number of rows.
    """
    schema = add_source_columns(PLAN, source_columns)
    with _DigestDatabase() as digests:
        rows = unreadable = 0
        for table in read_index():
            found = table.column("sha256").to_pylist()
            digests.add(rows, found)
            rows += len(found)
            unreadable += found.count(None)
        size = per_chunk or choose_chunk_rows(rows)
        writer = _ChunkWriter(size, schema, write, digests)
        for table in read_index():
            for columns in table.to_pylist():
                writer.add(ImageRow.from_columns(columns))
        writer.finish()
    return AnnotationPlan(rows, -(-rows // size), size, writer.duplicates, unreadable)


class _ChunkWriter:
    """Writes the rows of an index as chunks, in their order."""

    def __init__(self, size: int, schema: pa.Schema, write: WriteChunk, digests: "_DigestDatabase") -> None:
        self.duplicates = 0
        self._size = size
        self._schema = schema
        self._write = write
        self._digests = digests
        self._sorted_duplicates = digests.find_duplicates()
        self._next_duplicate = next(self._sorted_duplicates, None)
        self._row = 0
        self._chunk: list[PlannedImage] = []

    def add(self, image: ImageRow) -> None:
        first = None
        if self._next_duplicate is not None and self._next_duplicate[0] == self._row:
            first = self._next_duplicate[1]
            self._next_duplicate = next(self._sorted_duplicates, None)
            self.duplicates += 1
        planned = PlannedImage(self._row, first, image)
        if first is not None and first // self._size != self._row // self._size:
            self._digests.defer(first // self._size, planned)
        else:
            self._chunk.append(planned)
        self._row += 1
        if self._row % self._size == 0:
            self._write_chunk(self._row // self._size - 1)

    def finish(self) -> None:
        """Write the last chunk, and the duplicates that belong to earlier chunks."""
        if self._row % self._size:
            self._write_chunk(self._row // self._size)
        for number, deferred in self._digests.read_deferred():
            part = ParquetBuffer(self._schema)
            while batch := list(islice(deferred, BATCH_ROWS)):
                part.add(self._make_table(batch))
            self._write(f"{number:06d}-late", part.rows, part.finish())

    def _write_chunk(self, number: int) -> None:
        self._write(f"{number:06d}", len(self._chunk), to_parquet(self._make_table(self._chunk)))
        self._chunk = []

    def _make_table(self, rows: Iterable[PlannedImage]) -> pa.Table:
        return pa.Table.from_pylist([row.to_columns() for row in rows], self._schema)


class _DigestDatabase:
    """The digests of all rows, on disk, and rows that are deferred to an earlier chunk. A context manager."""

    def __enter__(self) -> Self:
        self._database = open_temporary_database(
            ["digests (digest BLOB, row INTEGER)", "late (chunk INTEGER, row INTEGER, planned BLOB)"],
            cache_kib=_CACHE_KIB,
        )
        self._database.execute("BEGIN")  # never committed, because every commit would write to disk
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def add(self, first_row: int, digests: list[str | None]) -> None:
        """Store the digests of consecutive rows; None if a row has none."""
        numbered = enumerate(digests, first_row)
        self._database.executemany(
            "INSERT INTO digests VALUES (?, ?)", ((bytes.fromhex(each), row) for row, each in numbered if each)
        )

    def find_duplicates(self) -> Iterator[tuple[int, int]]:
        """Each row whose bytes an earlier row has, with the first such row; in the order of the rows."""
        self._database.execute(
            "CREATE TABLE duplicates AS SELECT row, first FROM (SELECT row, MIN(row) OVER (PARTITION BY digest) AS "
            "first FROM digests) WHERE row <> first"
        )
        return iter(self._database.execute("SELECT row, first FROM duplicates ORDER BY row"))

    def defer(self, chunk: int, planned: PlannedImage) -> None:
        """Store a row for a chunk before its own."""
        self._database.execute("INSERT INTO late VALUES (?, ?, ?)", (chunk, planned.row, pickle.dumps(planned)))

    def read_deferred(self) -> Iterator[tuple[int, Iterator[PlannedImage]]]:
        """The deferred rows of each chunk."""
        found = self._database.execute("SELECT chunk, planned FROM late ORDER BY chunk, row")
        for chunk, rows in groupby(found, itemgetter(0)):
            yield chunk, (pickle.loads(planned) for _, planned in rows)

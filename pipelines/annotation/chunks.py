"""Makes chunks of an index: rows in the order of the source, with what is the same as an earlier one beside it.

A chunk is what is judged and kept as one. A row whose image was seen before goes to the chunk of the first one with
the same bytes, so that nothing has to be known of other chunks to judge an image once. Digests are sorted in one of
SQLite's temporary files (SQLITE_TMPDIR, else TMPDIR; some 100 bytes for each image, twice that while they are sorted),
so that memory does not grow with the source.
"""

import pickle
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from operator import itemgetter
from typing import Final

import pyarrow as pa

from pipelines.annotation.schema import BATCH_ROWS, PLAN, ParquetBuffer, Row, to_parquet, with_extras

_CACHE_KIB: Final = 65_536
_CHUNK_ROWS: Final = (50, 5_000)
_CHUNKS: Final = 10_000

Tables = Callable[[], Iterable[pa.Table]]
Write = Callable[[str, int, bytes], None]
"""Takes the name of a part, its rows and the parquet file of them."""


@dataclass(frozen=True, slots=True)
class AnnotationPlan:
    """What there is to do."""

    rows: int
    chunks: int
    chunk_rows: int
    duplicates: int
    unreadable: int


def chunk_rows(rows: int) -> int:
    """How many rows a chunk has, so that there are some thousands of chunks at most."""
    return min(max(rows // _CHUNKS, _CHUNK_ROWS[0]), _CHUNK_ROWS[1])


def make(tables: Tables, extras: pa.Schema, write: Write, per_chunk: int | None) -> AnnotationPlan:
    """Write the chunks, some of them in two parts: `000123` and, with duplicates from later chunks, `000123-late`.

    The same index always gives the same chunks.

    Args:
        tables: the index, the same each time that it is asked for.
        write: writes a part.
        per_chunk: rows of a chunk; chosen by the number of rows unless given.
    """
    schema = with_extras(PLAN, extras)
    with _Digests() as digests:
        rows = unreadable = 0
        for table in tables():
            found = table.column("sha256").to_pylist()
            digests.add(rows, found)
            rows += len(found)
            unreadable += found.count(None)
        size = per_chunk or chunk_rows(rows)
        firsts = digests.duplicates()
        duplicates = _write_chunks(tables(), firsts, size, schema, write, digests)
        for chunk, late in digests.late():
            part = ParquetBuffer(schema)
            while some := list(islice(late, BATCH_ROWS)):
                part.add(pa.Table.from_pylist(some, schema))
            write(f"{chunk:06d}-late", part.rows, part.finish())
    return AnnotationPlan(rows, -(-rows // size), size, duplicates, unreadable)


def _write_chunks(
    tables: Iterable[pa.Table],
    firsts: Iterator[tuple[int, int]],
    size: int,
    schema: pa.Schema,
    write: Write,
    digests: "_Digests",
) -> int:
    def keep(number: int) -> None:
        write(f"{number:06d}", len(chunk), to_parquet(pa.Table.from_pylist(chunk, schema)))

    row = duplicates = 0
    upcoming = next(firsts, None)
    chunk: list[Row] = []
    for table in tables:
        for values in table.to_pylist():
            first = None
            if upcoming is not None and upcoming[0] == row:
                first, upcoming = upcoming[1], next(firsts, None)
                duplicates += 1
            planned = {"row": row, "duplicate_of": first, **values}
            if first is not None and first // size != row // size:
                digests.put_off(first // size, planned)
            else:
                chunk.append(planned)
            row += 1
            if row % size == 0:
                keep(row // size - 1)
                chunk = []
    if row % size:
        keep(row // size)
    return duplicates


class _Digests:
    """Digests of all rows on disk. To be used as a context manager."""

    def __enter__(self) -> "_Digests":
        self._database = sqlite3.connect("", isolation_level=None)
        for statement in (
            "PRAGMA journal_mode = OFF",
            "PRAGMA synchronous = OFF",
            "PRAGMA temp_store = FILE",
            f"PRAGMA cache_size = -{_CACHE_KIB}",
            "CREATE TABLE digests (digest BLOB, row INTEGER)",
            "CREATE TABLE late (chunk INTEGER, row INTEGER, planned BLOB)",
            "BEGIN",  # and never committed: each commit would write a page
        ):
            self._database.execute(statement)
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def add(self, first_row: int, digests: list[str | None]) -> None:
        """Those of consecutive rows; None where a row has none."""
        numbered = enumerate(digests, first_row)
        self._database.executemany(
            "INSERT INTO digests VALUES (?, ?)", ((bytes.fromhex(each), row) for row, each in numbered if each)
        )

    def duplicates(self) -> Iterator[tuple[int, int]]:
        """Every row with the bytes of an earlier one, and the first of them; in the order of the rows."""
        self._database.execute(
            "CREATE TABLE duplicates AS SELECT row, first FROM (SELECT row, MIN(row) OVER (PARTITION BY digest) AS "
            "first FROM digests) WHERE row <> first"
        )
        return iter(self._database.execute("SELECT row, first FROM duplicates ORDER BY row"))

    def put_off(self, chunk: int, planned: Row) -> None:
        """Keep a row for a chunk before its own."""
        self._database.execute("INSERT INTO late VALUES (?, ?, ?)", (chunk, planned["row"], pickle.dumps(planned)))

    def late(self) -> Iterator[tuple[int, Iterator[Row]]]:
        """The rows that were put off, by chunk."""
        found = self._database.execute("SELECT chunk, planned FROM late ORDER BY chunk, row")
        for chunk, rows in groupby(found, itemgetter(0)):
            yield chunk, (pickle.loads(planned) for _, planned in rows)

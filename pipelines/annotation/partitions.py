"""Puts the annotations of all chunks into partitions, where others read them."""

from collections.abc import Callable, Iterator
from typing import Final
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.annotation.schema import NO_VALUE, PARTITIONS, to_parquet
from pipelines.annotation.state import RunState
from services.core.errors import SluiceError

_FILE_ROWS: Final = 50_000


def publish(run: RunState, chunks: int, progress: Callable[[int], None]) -> None:
    """Write the partitions. Chunks never change once they are there, so this may be done again at any time."""
    for part, table in enumerate(_parts(run, chunks)):
        for below, rows in _partitions(table):
            run.folder.put(f"{below}/part-{part:06d}.parquet", to_parquet(rows))
        progress(table.num_rows)


def _parts(run: RunState, chunks: int) -> Iterator[pa.Table]:
    """The annotations, enough rows for a file at a time."""
    some: list[pa.Table] = []
    for number in range(chunks):
        for table in _chunk(run, number):
            some.append(table)
            if sum(each.num_rows for each in some) >= _FILE_ROWS:
                yield pa.concat_tables(some).sort_by("row")
                some = []
    if some:
        yield pa.concat_tables(some).sort_by("row")


def _chunk(run: RunState, number: int) -> Iterator[pa.Table]:
    rows = run.rows("chunks", f"{number:06d}")
    if rows is None:
        raise SluiceError(f"chunk {number} of {run.folder.uri} is gone; another run has finished it, or it was removed")
    return rows


def _partitions(table: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """Each combination of values that occurs, as the name of its folder, with its rows without them."""
    for values in table.select(PARTITIONS).group_by(list(PARTITIONS)).aggregate([]).to_pylist():
        rows = table
        for name in PARTITIONS:
            column, value = rows.column(name), values[name]
            rows = rows.filter(pc.is_null(column) if value is None else pc.equal(column, value))
        folders = (f"{n}={NO_VALUE if values[n] is None else quote(values[n], safe='')}" for n in PARTITIONS)
        yield "/".join(folders), rows.drop_columns(list(PARTITIONS))

"""Writes the annotations of all chunks as Hive partitions, the output of a run."""

from collections.abc import Callable, Iterator
from typing import Final
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.annotation.resume_state import RunState
from pipelines.annotation.schema import NO_VALUE, PARTITIONS, to_parquet

_FILE_ROWS: Final = 50_000


def publish_partitions(run: RunState, chunks: int, progress: Callable[[int], None]) -> None:
    """Write the partitions. Chunks never change once they are stored, so a repeated call writes the same files."""
    for part, table in enumerate(_merge_chunks(run, chunks)):
        for below, rows in _split_by_partition(table):
            run.folder.put(f"{below}/part-{part:06d}.parquet", to_parquet(rows))
        progress(table.num_rows)


def _merge_chunks(run: RunState, chunks: int) -> Iterator[pa.Table]:
    """The annotations, in tables with enough rows for a file."""
    merged: list[pa.Table] = []
    for number in range(chunks):
        for table in run.read_judged(number):
            merged.append(table)
            if sum(each.num_rows for each in merged) >= _FILE_ROWS:
                yield pa.concat_tables(merged).sort_by("row")
                merged = []
    if merged:
        yield pa.concat_tables(merged).sort_by("row")


def _split_by_partition(table: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """For each combination of the partition columns, the folder and the rows, without these columns."""
    for values in table.select(PARTITIONS).group_by(list(PARTITIONS)).aggregate([]).to_pylist():
        rows = table
        for name in PARTITIONS:
            column, value = rows.column(name), values[name]
            rows = rows.filter(pc.is_null(column) if value is None else pc.equal(column, value))
        folders = (f"{n}={NO_VALUE if values[n] is None else quote(values[n], safe='')}" for n in PARTITIONS)
        yield "/".join(folders), rows.drop_columns(list(PARTITIONS))

"""Reads annotations from their partitions, in batches."""

from collections.abc import Iterator
from typing import Final
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.annotation.schema import NO_VALUE, PARTITIONS
from pipelines.annotation.storage import Folder

_BATCH_ROWS: Final = 4_096


def list_partition_files(folder: Folder) -> Iterator[str]:
    """The names of all files with annotations."""
    for entry in folder.entries():
        steps = entry.name.split("/")
        if len(steps) == len(PARTITIONS) + 1 and steps[0].startswith("outcome=") and steps[-1].startswith("part-"):
            yield entry.name


def read_annotations(folder: Folder, name: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """The rows of such a file, with the columns that are in the names of its folders."""
    values = dict(step.split("=", 1) for step in name.split("/")[:-1])
    with folder.open(name) as file:
        table = pq.ParquetFile(file)
        stored = None if columns is None else [c for c in columns if c not in PARTITIONS]
        for batch in table.iter_batches(_BATCH_ROWS, columns=stored):
            rows = pa.Table.from_batches([batch])
            for column in PARTITIONS:
                if columns is None or column in columns:
                    value = None if values[column] == NO_VALUE else unquote(values[column])
                    rows = rows.append_column(column, pa.array([value] * batch.num_rows, pa.string()))
            yield rows

"""The tables of a run: what is known of an image before it is judged, and the row that comes of it."""

import io
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic_core import to_json

from services.core.messages import Verdict

_MOMENT: Final = pa.timestamp("us", tz="UTC")
_PLACE: Final = pa.struct(
    [("file", pa.string()), ("offset", pa.int64()), ("size", pa.int64()), ("group", pa.int64()), ("etag", pa.string())]
)
"""Where the bytes of an image lie that is no object in S3: bytes of a file, or a row of a parquet row group."""

INDEX: Final = pa.schema(
    [
        ("id", pa.string()),
        ("uri", pa.string()),
        ("version_id", pa.string()),
        ("etag", pa.string()),
        ("tenant", pa.string()),
        ("sha256", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("place", _PLACE),
    ]
)
"""A row for each image of a piece: its digest, or the reason why it cannot be read."""

PLAN: Final = pa.schema([("row", pa.int64()), ("duplicate_of", pa.int64()), *INDEX])
"""`row` counts through the whole source; `duplicate_of` is the row with the same bytes that is judged."""

ANNOTATION: Final = pa.schema(
    [
        ("row", pa.int64()),
        ("submission_id", pa.string()),
        ("uri", pa.string()),
        ("version_id", pa.string()),
        ("etag", pa.string()),
        ("sha256", pa.string()),
        ("duplicate_of", pa.int64()),
        ("verdict_id", pa.string()),
        ("tenant", pa.string()),
        ("outcome", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("rating", pa.string()),
        ("category", pa.string()),
        ("rationale", pa.string()),
        ("score", pa.float64()),
        ("action", pa.string()),
        ("policy", pa.struct([("name", pa.string()), ("version", pa.int64()), ("digest", pa.string())])),
        (
            "model",
            pa.struct(
                [("name", pa.string()), ("revision", pa.string()), ("engine", pa.string()), ("prompt", pa.string())]
            ),
        ),
        ("calibration", pa.struct([("digest", pa.string()), ("raw_score", pa.float64())])),
        ("effort", pa.string()),
        ("source", pa.string()),
        (
            "image",
            pa.struct([("width", pa.int64()), ("height", pa.int64()), ("format", pa.string()), ("frames", pa.int64())]),
        ),
        (
            "timings_ms",
            pa.struct([(step, pa.int64()) for step in ("queued", "fetch", "prepare", "guard", "total")]),
        ),
        ("metadata", pa.string()),
        ("submitted_at", _MOMENT),
        ("judged_at", _MOMENT),
        ("place", _PLACE),
    ]
)
"""A verdict's fields under their own names, `metadata` as JSON; of what can never be judged, the outcome is
`dead_letter`, with its reason and a sentence in `detail`. The source's own columns follow, as `source_<name>`."""

PARTITIONS: Final = ("outcome", "rating")
NO_VALUE: Final = "none"
"""Where a partition's column is null: pandas cannot read what Hive writes there."""
DEAD_LETTER: Final = "dead_letter"

BATCH_ROWS: Final = 5_000
"""Rows that are worked on at a time. An image may have any number of duplicates, and all are in one chunk."""

Row = dict[str, Any]


def with_extras(schema: pa.Schema, extras: pa.Schema) -> pa.Schema:
    """The schema with the source's own columns."""
    return pa.schema([*schema, *extras])


class ParquetBuffer:
    """A parquet file, compressed in memory, that is made of one table after the other."""

    def __init__(self, schema: pa.Schema) -> None:
        self.rows = 0
        self._buffer = io.BytesIO()
        self._writer = pq.ParquetWriter(self._buffer, schema, compression="zstd")

    def add(self, table: pa.Table) -> None:
        """Append its rows."""
        self._writer.write_table(table)
        self.rows += table.num_rows

    def finish(self) -> bytes:
        """The file. Nothing can be added any more."""
        self._writer.close()
        return self._buffer.getvalue()


def to_parquet(table: pa.Table) -> bytes:
    """A parquet file of one table."""
    buffer = ParquetBuffer(table.schema)
    buffer.add(table)
    return buffer.finish()


def from_parquet(data: bytes) -> Iterator[pa.Table]:
    """The rows of a parquet file, at most `BATCH_ROWS` at a time."""
    for batch in pq.ParquetFile(io.BytesIO(data)).iter_batches(BATCH_ROWS):
        yield pa.Table.from_batches([batch])


class Failure(NamedTuple):
    """Why an image can never be judged."""

    reason: str
    detail: str


def annotation(planned: Row, answer: Verdict | Failure, extras: list[str]) -> Row:
    """The row of an image. `planned` is its row of the plan, the verdict is its own."""
    row: Row = {name: planned[name] for name in ("row", "duplicate_of", "place", *extras)}
    if isinstance(answer, Verdict):
        return row | answer.model_dump() | {"metadata": to_json(answer.metadata).decode(), "detail": None}
    return row | {
        "submission_id": planned["id"],
        "outcome": DEAD_LETTER,
        "reason": answer.reason,
        "detail": answer.detail,
        **{name: planned[name] for name in ("uri", "version_id", "etag", "sha256", "tenant")},
    }

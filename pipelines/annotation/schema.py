"""The annotations of a run: their columns, and how tables are kept as parquet files."""

import io
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic_core import to_json

from pipelines.annotation.filters import DEAD_LETTER
from pipelines.annotation.image_row import LOCATION, FileLocation, ImageRow, PlannedImage
from services.core.messages import Verdict

_TIME: Final = pa.timestamp("us", tz="UTC")

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
        ("submitted_at", _TIME),
        ("judged_at", _TIME),
        ("place", LOCATION),
    ]
)
"""The fields of a verdict under their own names; `metadata` is JSON. If an image can never be judged, its outcome is
`dead_letter`, with a reason and a sentence in `detail`. The source's own columns follow, as `source_<name>`."""

PARTITIONS: Final = ("outcome", "rating")
NO_VALUE: Final = "none"
"""The value of a partition whose column is null. pandas cannot read Hive's null partition."""

BATCH_ROWS: Final = 5_000
"""Rows in memory at a time. One chunk has all duplicates of an image, and their number has no limit."""


def add_source_columns(schema: pa.Schema, source_columns: pa.Schema) -> pa.Schema:
    """The schema, followed by the source's own columns."""
    return pa.schema([*schema, *source_columns])


class ParquetBuffer:
    """A compressed parquet file in memory, to which tables are appended."""

    def __init__(self, schema: pa.Schema) -> None:
        self.rows = 0
        self._buffer = io.BytesIO()
        self._writer = pq.ParquetWriter(self._buffer, schema, compression="zstd")

    def add(self, table: pa.Table) -> None:
        """Append the rows of a table."""
        self._writer.write_table(table)
        self.rows += table.num_rows

    def finish(self) -> bytes:
        """The bytes of the file. Nothing can be added afterwards."""
        self._writer.close()
        return self._buffer.getvalue()


def to_parquet(table: pa.Table) -> bytes:
    """The parquet file of one table."""
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


def make_annotation(planned: PlannedImage, answer: Verdict | Failure, duplicate_of: int | None) -> dict[str, Any]:
    """The values of the columns of an annotation. `duplicate_of` is the row whose answer is reused, if there is one."""
    image = planned.image
    columns = planned.to_columns()
    kept = {"row": planned.row, "duplicate_of": duplicate_of, "place": columns["place"], **image.source_columns}
    if isinstance(answer, Verdict):
        return kept | answer.model_dump() | {"metadata": to_json(answer.metadata).decode(), "detail": None}
    return kept | {
        "submission_id": image.id,
        "uri": image.uri,
        "version_id": image.version_id,
        "etag": image.etag,
        "sha256": image.sha256,
        "tenant": image.tenant,
        "outcome": DEAD_LETTER,
        "reason": answer.reason,
        "detail": answer.detail,
    }


def to_image_row(annotation: Mapping[str, Any]) -> ImageRow:
    """The image that an annotation is about, to read it again."""
    place = annotation["place"]
    return ImageRow(
        id=annotation["submission_id"],
        uri=annotation["uri"],
        version_id=annotation["version_id"],
        etag=annotation["etag"],
        tenant=annotation["tenant"],
        sha256=annotation["sha256"],
        place=FileLocation(**place) if place else None,
    )

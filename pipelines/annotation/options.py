"""What a user of `sluice annotate` can ask for. Without Ray, which reads its environment when it is imported."""

from dataclasses import dataclass
from typing import Literal

from pipelines.annotation.filters import Filter

SourceKind = Literal["images", "references", "tars", "parquet"]
"""`images`: every file is one. `references`: JSON lines or parquet. `parquet`: with the images' bytes."""

CuratedFormat = Literal["references", "tars"]
"""Of a curated set."""


@dataclass(frozen=True, slots=True)
class AnnotateOptions:
    """One call of the command; what is None is decided by the source, the settings or what runs."""

    source: str
    out: str
    policy: str
    kind: SourceKind | None = None
    column: str | None = None
    root: str | None = None
    replicas: int | None = None
    share_guard: bool = False
    workers: int | None = None
    chunk_rows: int | None = None
    wanted: Filter | None = None
    curated: str | None = None
    curated_format: CuratedFormat = "references"

"""The options of `sluice annotate`. Imports no Ray, because Ray reads its environment when it is imported."""

from dataclasses import dataclass
from typing import Literal

from pipelines.annotation.filters import Filter

SourceKind = Literal["images", "references", "tars", "parquet"]
"""`images`: every file is an image. `references`: JSON lines or parquet. `parquet`: tables with the images' bytes."""

CuratedFormat = Literal["references", "tars"]
"""The format of a curated set."""


@dataclass(frozen=True, slots=True)
class AnnotateOptions:
    """The arguments of one run. An option that is None is chosen from the source, the settings and the cluster."""

    source: str
    out: str
    policy: str
    source_kind: SourceKind | None = None
    column: str | None = None
    root: str | None = None
    replicas: int | None = None
    share_guard: bool = False
    workers: int | None = None
    chunk_rows: int | None = None
    row_filter: Filter | None = None
    curated: str | None = None
    curated_format: CuratedFormat = "references"

"""What a data set is made of: how its kind is told, and how it is cut into pieces that are read on their own."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, Final, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.annotation.options import SourceKind
from pipelines.annotation.storage import Entry, Folder, folder, local_path
from services.core.errors import ConfigurationError, NotFound, SluiceError
from services.core.s3_uri import parse_s3_uri
from services.core.settings import Settings

REFERENCE_COLUMNS: Final = ("image", "file_name", "image_path", "path", "uri")
"""The names of the column with the reference, in order of priority; `sluice evaluate` reads them in the same order."""
BYTES_COLUMNS: Final = ("image", "bytes", "jpg", "png", "webp")
"""Likewise for the images themselves: bytes, or {bytes, path} as Hugging Face stores them."""
OWN_COLUMNS: Final = ("id", "version_id", "etag", "tenant")
"""Columns of a list of references that mean what they mean in a submission, where they are text."""

LINES: Final = (".jsonl", ".ndjson", ".json")
_TABLES: Final = (".parquet",)
_TARS: Final = (".tar",)
_COMPRESSED_TARS: Final = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_SHARD_IMAGES: Final = 1_000
_SHARD_ROWS: Final = 5_000
_SHARD_LINES_BYTES: Final = 1 << 20
_ENTRIES_EXAMINED: Final = 10_000


@dataclass(frozen=True, slots=True)
class SourceShard:
    """A part of the source: some files of a folder, or a range of one file."""

    names: tuple[str, ...]
    start: int = 0
    """Of JSON lines, the first byte; of a table, the first row of the row group."""
    end: int = 0
    """Exclusive."""
    group: int = 0
    """Of a table, the row group."""
    broken: str | None = None
    """Why the file cannot be read at all."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "SourceShard":
        return cls(**values | {"names": tuple(values["names"])})


@dataclass(frozen=True, slots=True)
class AnnotationSource:
    """A data set to annotate."""

    place: str
    """The folder that names are relative to."""
    only: str | None
    """One file of the folder, where the source is that file."""
    kind: SourceKind
    column: str | None
    """Of a table or lines: the column with the reference or the image."""

    @property
    def uri(self) -> str:
        return f"{self.place}/{self.only}" if self.only else self.place


def find(
    place: str, settings: Settings, *, kind: SourceKind | None = None, column: str | None = None
) -> AnnotationSource:
    """The data set at a place; its kind is told by the names of its files, and of a table by its columns.

    Raises:
        ConfigurationError: there is none, or it is unclear what it is.
    """
    base, only = _base(place, settings)
    within = folder(base, settings)
    names = [entry.name for entry in _some(_entries(within, only))]
    if not names:
        raise ConfigurationError(f"there is nothing to annotate at {place}: no such file or folder, or an empty one")
    kinds = {_kind_of(name) for name in names}
    if "compressed" in kinds:
        raise ConfigurationError(f"{place} holds compressed tars, which cannot be read from the middle; unpack them")
    if kind is None:
        if len(kinds) > 1:
            raise ConfigurationError(
                f"{place} holds files of several kinds ({', '.join(sorted(kinds))}); say --format, one of "
                f"{', '.join(get_args(SourceKind))}, or give a folder with one kind"
            )
        kind = "images" if kinds == {"images"} else "tars" if kinds == {"tars"} else None
    if kind in ("images", "tars"):
        return AnnotationSource(base, only, kind, None)
    tables = [name for name in names if name.endswith(_TABLES)]
    if not tables:
        if kind == "parquet":
            raise ConfigurationError(f"there is no parquet file at {place}")
        return AnnotationSource(base, only, "references", column)
    found, column = _columns(within, tables[0], kind, column)
    return AnnotationSource(base, only, found, column)


def _base(place: str, settings: Settings) -> tuple[str, str | None]:
    """The folder of a place, and the file where the place is one."""
    if not place.startswith("s3://"):
        path = local_path(place)
        return (path.parent.as_uri(), path.name) if path.is_file() else (path.as_uri(), None)
    within = folder(place, settings)
    parent, _, name = within.uri.rpartition("/")
    if place.endswith("/") or parent == "s3:/":
        return within.uri, None
    try:
        folder(parent, settings).open(name).close()
    except NotFound:
        return within.uri, None
    return parent, name


def _entries(within: Folder, only: str | None) -> Iterator[Entry]:
    """The files that count: what begins with . or _, or lies in such a folder, is someone's housekeeping."""
    if only is not None:
        with within.open(only) as file:
            yield Entry(only, file.seek(0, 2))
        return
    for entry in within.entries():
        if not any(part.startswith((".", "_")) for part in entry.name.split("/")):
            yield entry


def _some(entries: Iterator[Entry]) -> Iterator[Entry]:
    for _ in range(_ENTRIES_EXAMINED):
        if (entry := next(entries, None)) is None:
            return
        yield entry


def _kind_of(name: str) -> str:
    lower = name.lower()
    if lower.endswith(_COMPRESSED_TARS):
        return "compressed"
    if lower.endswith(_TARS):
        return "tars"
    if lower.endswith(_TABLES):
        return "tables"
    return "lines" if lower.endswith(LINES) else "images"


def _columns(within: Folder, name: str, kind: SourceKind | None, column: str | None) -> tuple[SourceKind, str]:
    """What a table has: images or references, and in which column."""
    uri = within.uri_of(name)
    try:
        with within.open(name) as file:
            schema = pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise ConfigurationError(f"{uri} is no readable parquet file: {_brief(error)}") from None
    if column is not None and column not in schema.names:
        raise ConfigurationError(f"{uri} has no column {column!r}; it has {', '.join(schema.names)}")
    with_bytes = [c for c in ([column] if column else BYTES_COLUMNS) if c in schema.names and _has_bytes(schema, c)]
    with_text = [c for c in ([column] if column else REFERENCE_COLUMNS) if c in schema.names and _is_text(schema, c)]
    if with_bytes and kind != "references":
        return "parquet", with_bytes[0]
    if with_text and kind != "parquet":
        return "references", with_text[0]
    raise ConfigurationError(
        f"{uri} has no column with images or references: name it by --column; it has {', '.join(schema.names)}"
    )


def _has_bytes(schema: pa.Schema, column: str) -> bool:
    kind = schema.field(column).type
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_binary(field.type) for field in kind)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(schema: pa.Schema, column: str) -> bool:
    kind = schema.field(column).type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def extra_fields(source: AnnotationSource, settings: Settings) -> pa.Schema:
    """The columns that the rows of a source have of their own, as they are called in the annotations."""
    if source.kind == "images":
        return pa.schema([])
    within = folder(source.place, settings)
    tables = (e.name for e in _entries(within, source.only) if e.name.endswith(_TABLES))
    if source.kind == "tars" or (name := next(tables, None)) is None:
        return pa.schema([("source_json", pa.string())])
    with within.open(name) as file:
        schema = pq.read_schema(file)
    own = {source.column, *(c for c in OWN_COLUMNS if source.kind == "references")}
    return pa.schema([pa.field(f"source_{f.name}", f.type) for f in schema if f.name not in own])


def shards(source: AnnotationSource, settings: Settings) -> Iterator[SourceShard]:
    """The whole source, in an order that only its names and sizes decide."""
    within = folder(source.place, settings)
    entries = _entries(within, source.only)
    if source.kind == "images":
        while some := [entry.name for _, entry in zip(range(_SHARD_IMAGES), entries, strict=False)]:
            yield SourceShard(tuple(some))
        return
    suffixes = {"tars": _TARS, "parquet": _TABLES, "references": _TABLES + LINES}[source.kind]
    chosen = (entry for entry in entries if entry.name.lower().endswith(suffixes))
    yield from chain.from_iterable(_of_file(within, entry) for entry in chosen)


def _of_file(within: Folder, entry: Entry) -> Iterator[SourceShard]:
    name, lower = entry.name, entry.name.lower()
    if lower.endswith(_TARS):
        yield SourceShard((name,))
    elif lower.endswith(LINES):
        for start in range(0, entry.size, _SHARD_LINES_BYTES):
            yield SourceShard((name,), start, min(start + _SHARD_LINES_BYTES, entry.size))
    else:
        try:
            with within.open(name) as file:
                metadata = pq.read_metadata(file)
                groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        except (pa.ArrowException, OSError, SluiceError) as error:
            yield SourceShard((name,), broken=f"no readable parquet file: {_brief(error)}")
            return
        for group, rows in enumerate(groups):
            for start in range(0, rows, _SHARD_ROWS):
                yield SourceShard((name,), start, min(start + _SHARD_ROWS, rows), group)


def is_local(place: str) -> bool:
    """Whether only this machine has it."""
    return not place.startswith("s3://")


def bucket_of(place: str) -> str | None:
    """The bucket of a place in S3."""
    return parse_s3_uri(place)[0] if place.startswith("s3://") else None


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]

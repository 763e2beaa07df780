"""Finds a data set, detects its format, and divides it into shards that are indexed independently."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.annotation.options import SourceKind
from pipelines.annotation.storage import Entry, Folder, local_path, open_folder
from pipelines.reporting.text import to_one_line
from services.core.errors import ConfigurationError, NotFound, SluiceError, Unjudgeable
from services.core.s3_uri import parse_s3_uri
from services.core.settings import Settings

REFERENCE_COLUMNS: Final = ("image", "file_name", "image_path", "path", "uri")
"""Names of the column with the reference, in order of priority. `sluice evaluate` uses the same order."""
BYTES_COLUMNS: Final = ("image", "bytes", "jpg", "png", "webp")
"""Names of the column with the images, in order of priority: bytes, or {bytes, path} as Hugging Face stores them."""
SUBMISSION_COLUMNS: Final = ("id", "version_id", "etag", "tenant")
"""Columns of a list of references with the meaning of the same field in a submission, if they are text."""

LINE_SUFFIXES: Final = (".jsonl", ".ndjson", ".json")
_TABLE_SUFFIXES: Final = (".parquet",)
_TAR_SUFFIXES: Final = (".tar",)
_COMPRESSED_TAR_SUFFIXES: Final = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_SHARD_IMAGES: Final = 1_000
_SHARD_ROWS: Final = 5_000
_SHARD_LINES_BYTES: Final = 1 << 20
_ENTRIES_EXAMINED: Final = 10_000


@dataclass(frozen=True, slots=True)
class SourceShard:
    """A part of the source: a number of image files, or a range of one file."""

    names: tuple[str, ...]
    start: int = 0
    """JSON lines: the first byte. Table: the first row of the row group."""
    end: int = 0
    """The byte or row after the last one."""
    group: int = 0
    """Table: the row group."""
    broken: str | None = None
    """Why the file as a whole is not readable; None if it is."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "SourceShard":
        return cls(**values | {"names": tuple(values["names"])})


@dataclass(frozen=True, slots=True)
class AnnotationSource:
    """A data set to annotate."""

    folder_uri: str
    """The folder of the source. Names of files are relative to it."""
    file_name: str | None
    """The file that is the source; None if the source is the whole folder."""
    kind: SourceKind
    column: str | None
    """Table or lines: the column with the reference or the image."""
    root: Path | None = None
    """A further folder of this machine whose files may be read; None if there is none."""

    @property
    def roots(self) -> tuple[Path, ...]:
        """The folders of this machine whose files may be read."""
        own = (local_path(self.folder_uri),) if is_local(self.folder_uri) else ()
        return (*own, self.root) if self.root else own

    def open(self, settings: Settings) -> Folder:
        """The folder of the source."""
        return open_folder(self.folder_uri, settings, self.root)

    @property
    def uri(self) -> str:
        return f"{self.folder_uri}/{self.file_name}" if self.file_name else self.folder_uri


def find_source(
    location: str,
    settings: Settings,
    *,
    kind: SourceKind | None = None,
    column: str | None = None,
    root: Path | None = None,
) -> AnnotationSource:
    """The data set at a path or URI. Names of files decide its format; for a table, its columns do.

    `kind` and `column` override the detected kind and column. `root`: a further folder whose files may be read.

    Raises:
        ConfigurationError: there is no data set, or its format is unclear.
        Unjudgeable: the file that is the source cannot be read.
    """
    folder_uri, file_name = _split_location(location, settings)
    within = open_folder(folder_uri, settings, root)
    names = [entry.name for entry in islice(_list_entries(within, file_name), _ENTRIES_EXAMINED)]
    if not names:
        raise ConfigurationError(f"there is nothing to annotate at {location}: no such file or folder, or an empty one")
    kinds = {_detect_kind(name) for name in names}
    if "compressed" in kinds:
        raise ConfigurationError(f"{location} has compressed tars, which Sluice cannot read; decompress them")
    if kind is None:
        if len(kinds) > 1:
            raise ConfigurationError(
                f"{location} has files of several kinds ({', '.join(sorted(kinds))}); name one with --format: "
                f"{', '.join(get_args(SourceKind))}; or give a folder with one kind of files"
            )
        kind = "images" if kinds == {"images"} else "tars" if kinds == {"tars"} else None
    if kind in ("images", "tars"):
        return AnnotationSource(folder_uri, file_name, kind, None, root)
    tables = [name for name in names if name.endswith(_TABLE_SUFFIXES)]
    if not tables:
        if kind == "parquet":
            raise ConfigurationError(f"there is no parquet file at {location}")
        return AnnotationSource(folder_uri, file_name, "references", column, root)
    found, column = _detect_column(within, _find_readable(within, tables) or tables[0], kind, column)
    return AnnotationSource(folder_uri, file_name, found, column, root)


def _split_location(location: str, settings: Settings) -> tuple[str, str | None]:
    """The URI of the folder of a location, and the name of the file if the location is a file."""
    if not location.startswith("s3://"):
        path = local_path(location)
        return (path.parent.as_uri(), path.name) if path.is_file() else (path.as_uri(), None)
    within = open_folder(location, settings)
    parent, _, name = within.uri.rpartition("/")
    if location.endswith("/") or parent == "s3:/":
        return within.uri, None
    try:
        open_folder(parent, settings).open(name).close()
    except NotFound:
        return within.uri, None
    return parent, name


def _list_entries(within: Folder, file_name: str | None) -> Iterator[Entry]:
    """The files of a source. Files and folders whose names begin with . or _ are not part of it."""
    if file_name is not None:
        with within.open(file_name) as file:
            yield Entry(file_name, file.seek(0, 2))
        return
    for entry in within.entries():
        if not any(part.startswith((".", "_")) for part in entry.name.split("/")):
            yield entry


def _detect_kind(name: str) -> str:
    lower = name.lower()
    if lower.endswith(_COMPRESSED_TAR_SUFFIXES):
        return "compressed"
    if lower.endswith(_TAR_SUFFIXES):
        return "tars"
    if lower.endswith(_TABLE_SUFFIXES):
        return "tables"
    return "lines" if lower.endswith(LINE_SUFFIXES) else "images"


def _find_readable(within: Folder, names: Iterable[str]) -> str | None:
    """The first of these files that can be opened. The others get a row with the reason."""
    for name in names:
        with suppress(Unjudgeable):
            within.open(name).close()
            return name
    return None


def _detect_column(within: Folder, name: str, kind: SourceKind | None, column: str | None) -> tuple[SourceKind, str]:
    """Whether a table has images or references, and the column with them."""
    uri = within.uri_of(name)
    try:
        with within.open(name) as file:
            schema = pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise ConfigurationError(f"{uri} is not a readable parquet file: {to_one_line(error)}") from None
    if column is not None and column not in schema.names:
        raise ConfigurationError(f"{uri} has no column {column!r}; it has {', '.join(schema.names)}")
    with_bytes = [c for c in ([column] if column else BYTES_COLUMNS) if c in schema.names and _has_bytes(schema, c)]
    with_text = [c for c in ([column] if column else REFERENCE_COLUMNS) if c in schema.names and _is_text(schema, c)]
    if with_bytes and kind != "references":
        return "parquet", with_bytes[0]
    if with_text and kind != "parquet":
        return "references", with_text[0]
    raise ConfigurationError(
        f"{uri} has no column with images or references; name one with --column: it has {', '.join(schema.names)}"
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


def read_source_columns(source: AnnotationSource, settings: Settings) -> pa.Schema:
    """The source's own columns, under the names that they have in the annotations."""
    if source.kind == "images":
        return pa.schema([])
    within = source.open(settings)
    tables = (entry.name for entry in _list_entries(within, source.file_name) if entry.name.endswith(_TABLE_SUFFIXES))
    if source.kind == "tars" or (name := _find_readable(within, tables)) is None:
        return pa.schema([("source_json", pa.string())])
    with within.open(name) as file:
        schema = pq.read_schema(file)
    own = {source.column, *(name for name in SUBMISSION_COLUMNS if source.kind == "references")}
    return pa.schema([pa.field(f"source_{f.name}", f.type) for f in schema if f.name not in own])


def list_shards(source: AnnotationSource, settings: Settings) -> Iterator[SourceShard]:
    """The shards of the whole source. Only names and sizes of files decide their order."""
    within = source.open(settings)
    entries = _list_entries(within, source.file_name)
    if source.kind == "images":
        while names := tuple(entry.name for entry in islice(entries, _SHARD_IMAGES)):
            yield SourceShard(names)
        return
    suffixes = {"tars": _TAR_SUFFIXES, "parquet": _TABLE_SUFFIXES, "references": _TABLE_SUFFIXES + LINE_SUFFIXES}[
        source.kind
    ]
    chosen = (entry for entry in entries if entry.name.lower().endswith(suffixes))
    yield from chain.from_iterable(_split_file(within, entry) for entry in chosen)


def _split_file(within: Folder, entry: Entry) -> Iterator[SourceShard]:
    name, lower = entry.name, entry.name.lower()
    if lower.endswith(_TAR_SUFFIXES):
        yield SourceShard((name,))
    elif entry.size == 0 and _find_readable(within, [name]) is None:
        yield SourceShard((name,))  # reading it reports the error
    elif lower.endswith(LINE_SUFFIXES):
        for start in range(0, entry.size, _SHARD_LINES_BYTES):
            yield SourceShard((name,), start, min(start + _SHARD_LINES_BYTES, entry.size))
    else:
        try:
            with within.open(name) as file:
                metadata = pq.read_metadata(file)
                groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        except (pa.ArrowException, OSError, SluiceError) as error:
            yield SourceShard((name,), broken=f"it is not a readable parquet file: {to_one_line(error)}")
            return
        for group, rows in enumerate(groups):
            for start in range(0, rows, _SHARD_ROWS):
                yield SourceShard((name,), start, min(start + _SHARD_ROWS, rows), group)


def is_local(location: str) -> bool:
    """Whether a location is on this machine, not in S3."""
    return not location.startswith("s3://")


def find_bucket(location: str) -> str | None:
    """The bucket of a location in S3; None for a location on this machine."""
    return parse_s3_uri(location)[0] if location.startswith("s3://") else None

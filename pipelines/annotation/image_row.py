"""The row of an image between the stages of a run: in the index, and in the plan before it is judged."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from types import NoneType
from typing import Any, Final, Self, get_args, get_type_hints

import pyarrow as pa

from services.core.errors import Unjudgeable

_ARROW_TYPES: Final = {str: pa.string(), int: pa.int64()}


@dataclass(frozen=True, slots=True)
class FileLocation:
    """Where the bytes of an image are in a file: a range of bytes, or a row of a parquet row group."""

    file: str
    """The URI of the file."""
    offset: int = 0
    """The first byte; for a table, the row within the row group."""
    size: int | None = None
    """In bytes; None if the image goes to the end of the file."""
    group: int | None = None
    """The row group; None if the file is no table."""
    etag: str | None = None
    """Always None; the column is part of the format of a run."""


@dataclass(frozen=True, slots=True)
class ImageRow:
    """An image of the source. Its fields are the columns of the index, under the same names."""

    id: str
    """The submission id. Empty for an S3 object until it is read, because the id has the object's version."""
    uri: str
    version_id: str | None = None
    etag: str | None = None
    tenant: str = "default"
    sha256: str | None = None
    """The digest of the image file, in hex; None if it cannot be read."""
    reason: str | None = None
    """Why the image can never be judged: the reason of a dead letter. None if it can be."""
    detail: str | None = None
    """A sentence on the reason."""
    place: FileLocation | None = None
    """Where the image is in a file; None if it is an object in S3."""
    source_columns: Mapping[str, Any] = field(default_factory=dict)
    """The source's own columns, named `source_<name>`; further columns of the index."""

    def with_error(self, error: Unjudgeable) -> Self:
        """The same row, with the reason why its image cannot be judged."""
        return replace(self, reason=error.reason, detail=str(error))

    def to_columns(self) -> dict[str, Any]:
        """The values of the row's columns."""
        columns: dict[str, Any] = {name: getattr(self, name) for name in _IMAGE_COLUMNS}
        if self.place is not None:
            columns["place"] = {name: getattr(self.place, name) for name in _LOCATION_COLUMNS}
        return {**columns, **self.source_columns}

    @classmethod
    def from_columns(cls, values: Mapping[str, Any]) -> Self:
        """The row that has these values in its columns; columns of other names are the source's own."""
        columns = {name: values[name] for name in _IMAGE_COLUMNS}
        if columns["place"] is not None:
            columns["place"] = FileLocation(**columns["place"])
        return cls(
            **columns, source_columns={name: value for name, value in values.items() if name not in _IMAGE_COLUMNS}
        )


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """An image in the plan of a run."""

    row: int
    """The number of the image in the whole source."""
    duplicate_of: int | None
    """The first row with the same bytes; None for that row itself."""
    image: ImageRow

    def to_columns(self) -> dict[str, Any]:
        """The values of the columns of the plan."""
        return {"row": self.row, "duplicate_of": self.duplicate_of, **self.image.to_columns()}

    @classmethod
    def from_columns(cls, values: Mapping[str, Any]) -> Self:
        """The planned image that has these values in its columns."""
        image = {name: value for name, value in values.items() if name not in ("row", "duplicate_of")}
        return cls(values["row"], values["duplicate_of"], ImageRow.from_columns(image))


_LOCATION_COLUMNS: Final = tuple(each.name for each in fields(FileLocation))
_IMAGE_COLUMNS: Final = tuple(each.name for each in fields(ImageRow) if each.name != "source_columns")


def _arrow_type(hint: Any) -> pa.DataType:
    (kind,) = (each for each in get_args(hint) or (hint,) if each is not NoneType)
    return pa.struct(_arrow_fields(kind)) if is_dataclass(kind) else _ARROW_TYPES[kind]


def _arrow_fields(row: Any) -> list[tuple[str, pa.DataType]]:
    hints = get_type_hints(row)
    return [(each.name, _arrow_type(hints[each.name])) for each in fields(row) if each.name != "source_columns"]


LOCATION: Final = pa.struct(_arrow_fields(FileLocation))
INDEX: Final = pa.schema(_arrow_fields(ImageRow))
"""A row for each image of a shard."""
PLAN: Final = pa.schema([("row", pa.int64()), ("duplicate_of", pa.int64()), *INDEX])
"""A row for each image of a chunk."""

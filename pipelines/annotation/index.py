"""Reads every image of a piece once, for its digest: what is the same is judged once, wherever it stands."""

import asyncio
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.annotation.image_reader import ImageReader, table_images
from pipelines.annotation.schema import INDEX, Row
from pipelines.annotation.sources.discover import LINES, OWN_COLUMNS, REFERENCE_COLUMNS, AnnotationSource, SourceShard
from pipelines.annotation.sources.references import References
from pipelines.annotation.sources.tars import Cut, Member, members
from pipelines.annotation.storage import folder
from services.core.errors import Malformed, NotAnImage, TooLarge, Unjudgeable
from services.core.messages import decode_json, id_of
from services.core.retry import retry_while_unavailable
from services.core.settings import Settings

_READS_IN_FLIGHT: Final = 32
_BLOCK_BYTES: Final = 1 << 20
_LINE_LIMIT_BYTES: Final = 1 << 20


class Indexer:
    """Makes the index of pieces. For use from one event loop; close it when done."""

    def __init__(self, source: AnnotationSource, extras: pa.Schema, settings: Settings, root: Path | None) -> None:
        """`root`: the folder below which files may be read that a list names."""
        self._source = source
        self._extras = extras
        self._folder = folder(source.place, settings)
        self._references = References(source.place, root)
        self._images = ImageReader(settings, source)

    def close(self) -> None:
        self._images.close()

    async def index(self, shard: SourceShard) -> pa.Table:
        """A row for each image; what is wrong with a file as a whole costs a row of its own.

        Waits for what is away.
        """
        try:
            rows, extras = await retry_while_unavailable(lambda: asyncio.to_thread(self._rows, shard))
            if self._source.kind in ("images", "references"):
                rows = await self._read_all(rows)
            return self._table(rows, extras)
        except Unjudgeable as error:
            return self._table([self._failure(shard.names[0], error)])
        except pa.ArrowException as error:
            return self._table([self._failure(shard.names[0], Malformed(f"it cannot be read: {error}"))])

    def _rows(self, shard: SourceShard) -> tuple[list[Row], pa.Table | None]:
        """The rows of a piece, and their own columns where those come from a table."""
        name = shard.names[0]
        if shard.broken:
            raise Malformed(shard.broken)
        if self._source.kind == "parquet":
            return self._images_of_table(shard)
        if self._source.kind == "references" and not name.lower().endswith(LINES):
            return self._references_of_table(shard)
        if self._source.kind == "references":
            return self._lines(shard), None
        return self._tar(name) if self._source.kind == "tars" else [self._file(each) for each in shard.names], None

    def _table(self, rows: list[Row], extras: pa.Table | None = None) -> pa.Table:
        table = pa.Table.from_pylist([_clean(row) for row in rows], INDEX)
        for field in self._extras:
            if extras is not None and field.name in extras.column_names:
                column = extras.column(field.name).cast(field.type)
            elif extras is None and field.name == "source_json":
                column = pa.array([row.get("source_json") for row in rows], pa.string())
            else:
                column = pa.nulls(len(rows), field.type)
            table = table.append_column(field, column)
        return table

    def _failure(self, name: str, error: Unjudgeable) -> Row:
        uri = self._folder.uri_of(name)
        return {"id": id_of(uri), "uri": uri, "tenant": "default", "reason": error.reason, "detail": str(error)}

    def _file(self, name: str) -> Row:
        uri = self._folder.uri_of(name)
        if uri.startswith("s3://"):
            return {"id": "", "uri": uri, "version_id": None, "etag": None, "tenant": "default", "place": None}
        return _embedded(uri, {"file": uri, "offset": 0, "size": None, "group": None, "etag": None})

    async def _read_all(self, rows: list[Row]) -> list[Row]:
        places = asyncio.Semaphore(_READS_IN_FLIGHT)

        async def read(row: Row) -> Row:
            async with places:
                return row if row.get("reason") else await retry_while_unavailable(lambda: self._digested(row))

        return await asyncio.gather(*map(read, rows))

    async def _digested(self, row: Row) -> Row:
        """The row, with what its object is now."""
        try:
            async with self._images.open(row) as stored:
                row = row | {"sha256": await asyncio.to_thread(_sha256, stored.data)}
                if row["place"] is None:
                    row |= {"version_id": stored.version_id, "etag": stored.etag}
        except Unjudgeable as error:
            row = row | {"reason": error.reason, "detail": str(error)}
        if not row["id"]:
            # As the stream calls it, where S3 tells of a new object.
            version = row["version_id"] or row["etag"]
            name = row["uri"].removeprefix("s3://")
            row["id"] = id_of(f"{name}#{version}" if version else name)
        return row

    def _tar(self, name: str) -> list[Row]:
        uri, rows = self._folder.uri_of(name), list[Row]()
        with self._folder.open(name) as file:
            try:
                for member in members(file):
                    rows.append(self._member(uri, member))
            except Cut as error:
                rows.append(self._failure(name, Malformed(str(error))))
            for row in rows:
                if not row.get("reason"):
                    row["sha256"] = _sha256_at(file, row["place"]["offset"], row["place"]["size"])
        return rows

    def _member(self, tar: str, member: Member) -> Row:
        uri = f"{tar}#{quote(member.name, safe='/', errors='surrogateescape')}"
        place = {"file": tar, "offset": member.offset, "size": member.size, "group": None, "etag": None}
        row = _embedded(uri, place) | {"source_json": json.dumps(member.notes) if member.notes else None}
        try:
            self._images.check_size(member.size)
        except TooLarge as error:
            row |= {"reason": error.reason, "detail": str(error)}
        if member.cut:
            row |= {"reason": NotAnImage.reason, "detail": "the tar is cut off in the middle of the image"}
        if member.refused:
            row |= {"reason": "forbidden", "detail": member.refused}
        return row

    def _images_of_table(self, shard: SourceShard) -> tuple[list[Row], pa.Table]:
        uri, rows, number = self._folder.uri_of(shard.names[0]), list[Row](), 0
        with self._folder.open(shard.names[0]) as file:
            for batch in table_images(file, shard.group, self._source.column or ""):
                for data in batch:
                    if shard.start <= number < shard.end:
                        rows.append(self._image_of_table(uri, shard.group, number, data))
                    number += 1
                if number >= shard.end:
                    break
            return rows, self._own_columns(file, shard, len(rows))

    def _image_of_table(self, table: str, group: int, number: int, data: bytes | None) -> Row:
        size = len(data) if data else 0
        place = {"file": table, "offset": number, "size": size, "group": group, "etag": None}
        row = _embedded(f"{table}#group={group}&row={number}", place)
        if data is None:
            return row | {"reason": NotAnImage.reason, "detail": "the row has no image"}
        try:
            self._images.check_size(size)
        except TooLarge as error:
            return row | {"reason": error.reason, "detail": str(error)}
        return row | {"sha256": _sha256(data)}

    def _references_of_table(self, shard: SourceShard) -> tuple[list[Row], pa.Table]:
        column = self._source.column or ""
        with self._folder.open(shard.names[0]) as file:
            table = pq.ParquetFile(file)
            if column not in table.schema_arrow.names:
                raise Malformed(f"there is no column {column!r}")
            wanted = [column, *(name for name in OWN_COLUMNS if name in table.schema_arrow.names)]
            some = table.read_row_group(shard.group, columns=wanted).slice(shard.start, shard.end - shard.start)
            rows = [self._referred(row.get(column), row) for row in some.to_pylist()]
            return rows, self._own_columns(file, shard, len(rows))

    def _own_columns(self, file: BinaryIO, shard: SourceShard, count: int) -> pa.Table:
        """The source's other columns, under the names that they have in the annotations."""
        table = pq.ParquetFile(file)
        names = [n for n in table.schema_arrow.names if f"source_{n}" in self._extras.names]
        some = table.read_row_group(shard.group, columns=names).slice(shard.start, count)
        return some.rename_columns([f"source_{name}" for name in names])

    def _lines(self, shard: SourceShard) -> list[Row]:
        with self._folder.open(shard.names[0]) as file:
            return [self._line(line) for line in lines(file, shard.start, shard.end)]

    def _line(self, line: bytes) -> Row:
        try:
            if len(line) > _LINE_LIMIT_BYTES:
                raise Malformed(f"the line is longer than {_LINE_LIMIT_BYTES} bytes")
            value = decode_json(line)
            if isinstance(value, str):
                value = {"uri": value}
            if not isinstance(value, dict):
                raise Malformed("the line is neither a JSON object nor a reference")
        except Malformed as error:
            return self._unreadable(line[:200].decode(errors="replace"), error)
        column = self._source.column or next((c for c in REFERENCE_COLUMNS if c in value), None)
        row = self._referred(value.get(column) if column else None, value)
        rest = {name: each for name, each in value.items() if name != column and name not in OWN_COLUMNS}
        return row | {"source_json": json.dumps(rest) if rest else None}

    def _referred(self, reference: Any, own: dict[str, Any]) -> Row:
        try:
            return self._references.row(reference, own)
        except Unjudgeable as error:
            return self._unreadable(str(reference or ""), error)

    def _unreadable(self, text: str, error: Unjudgeable) -> Row:
        return {
            "id": id_of(text),
            "uri": text,
            "version_id": None,
            "etag": None,
            "tenant": "default",
            "place": None,
            "reason": error.reason,
            "detail": str(error),
        }


def lines(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    """The lines that begin in a range of a file, without those that are empty; a longer one is cut at the limit."""
    file.seek(max(0, start - 1))
    if start:
        _to_end_of_line(file)
    while file.tell() < end:
        line = file.readline(_LINE_LIMIT_BYTES + 1)
        if len(line) > _LINE_LIMIT_BYTES and not line.endswith(b"\n"):
            _to_end_of_line(file)
        if line.strip():
            yield line


def _to_end_of_line(file: BinaryIO) -> None:
    while (part := file.readline(_LINE_LIMIT_BYTES)) and not part.endswith(b"\n"):
        pass


def _embedded(uri: str, place: Row) -> Row:
    return {"id": id_of(uri), "uri": uri, "version_id": None, "etag": None, "tenant": "default", "place": place}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sha256_at(file: BinaryIO, offset: int, size: int) -> str:
    digest = hashlib.sha256()
    file.seek(offset)
    while size > 0 and (block := file.read(min(size, _BLOCK_BYTES))):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()


def _clean(row: Row) -> Row:
    """Text of strangers as UTF-8 can hold it."""
    return {
        name: value.encode(errors="replace").decode() if isinstance(value, str) else value
        for name, value in row.items()
    }

"""Reads every image of the source once for its digest, because the same bytes are judged only once."""

import asyncio
import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Final
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.annotation.image_reader import ImageReader, read_table_images
from pipelines.annotation.image_row import INDEX, FileLocation, ImageRow
from pipelines.annotation.sources.discover import (
    LINE_SUFFIXES,
    REFERENCE_COLUMNS,
    SUBMISSION_COLUMNS,
    AnnotationSource,
    SourceShard,
)
from pipelines.annotation.sources.lines import LINE_LIMIT_BYTES, read_lines
from pipelines.annotation.sources.references import ReferenceResolver
from pipelines.annotation.sources.tars import TarImage, TruncatedTar, read_tar
from services.core.errors import Forbidden, Malformed, NotAnImage, TooLarge, Unjudgeable
from services.core.messages import decode_json, make_s3_submission_id, make_submission_id
from services.core.retry import retry_while_unavailable
from services.core.settings import Settings

_READS_IN_FLIGHT: Final = 32
_BLOCK_BYTES: Final = 1 << 20
_LINE_SHOWN_BYTES: Final = 200


class Indexer:
    """Makes the index of shards. For use from one event loop; close it when done."""

    def __init__(
        self, source: AnnotationSource, source_columns: pa.Schema, settings: Settings, root: Path | None
    ) -> None:
        """`root`: the folder whose files a list may name."""
        self._source = source
        self._source_columns = source_columns
        self._folder = source.open(settings)
        self._references = ReferenceResolver(source.folder_uri, root)
        self._images = ImageReader(settings, source)

    def close(self) -> None:
        self._images.close()

    async def index(self, shard: SourceShard) -> pa.Table:
        """A row for each image. If a file as a whole is not readable, it gets one row with the reason.

        Retries while the object store is unavailable.
        """
        try:
            rows, source_columns = await retry_while_unavailable(lambda: asyncio.to_thread(self._read_shard, shard))
            if self._source.kind in ("images", "references"):
                rows = await self._read_digests(rows)
            return self._make_table(rows, source_columns)
        except Unjudgeable as error:
            return self._make_table([self._make_unreadable_file_row(shard.names[0], error)])
        except pa.ArrowException as error:
            return self._make_table(
                [self._make_unreadable_file_row(shard.names[0], Malformed(f"it cannot be read: {error}"))]
            )

    def _read_shard(self, shard: SourceShard) -> tuple[list[ImageRow], pa.Table | None]:
        """The rows of a shard. If it is a part of a table, the source's own columns are a table, too."""
        name = shard.names[0]
        if shard.broken:
            raise Malformed(shard.broken)
        match self._source.kind:
            case "images":
                return [self._make_file_row(each) for each in shard.names], None
            case "tars":
                return self._read_tar(name), None
            case "parquet":
                return self._read_table_images(shard)
            case "references" if name.lower().endswith(LINE_SUFFIXES):
                return self._read_lines(shard), None
            case "references":
                return self._read_table_references(shard)

    def _make_table(self, rows: list[ImageRow], source_columns: pa.Table | None = None) -> pa.Table:
        table = pa.Table.from_pylist([_to_valid_text(row.to_columns()) for row in rows], INDEX)
        for field in self._source_columns:
            if source_columns is not None and field.name in source_columns.column_names:
                column = source_columns.column(field.name).cast(field.type)
            elif source_columns is None and field.name == "source_json":
                column = pa.array([row.source_columns.get("source_json") for row in rows], pa.string())
            else:
                column = pa.nulls(len(rows), field.type)
            table = table.append_column(field, column)
        return table

    def _make_unreadable_file_row(self, name: str, error: Unjudgeable) -> ImageRow:
        uri = self._folder.uri_of(name)
        return ImageRow(id=make_submission_id(uri), uri=uri).with_error(error)

    # Images as files or objects

    def _make_file_row(self, name: str) -> ImageRow:
        uri = self._folder.uri_of(name)
        if uri.startswith("s3://"):
            return ImageRow(id="", uri=uri)
        return ImageRow(id=make_submission_id(uri), uri=uri, place=FileLocation(uri))

    async def _read_digests(self, rows: list[ImageRow]) -> list[ImageRow]:
        slots = asyncio.Semaphore(_READS_IN_FLIGHT)

        async def read(row: ImageRow) -> ImageRow:
            async with slots:
                return row if row.reason else await retry_while_unavailable(lambda: self._read_digest(row))

        return await asyncio.gather(*map(read, rows))

    async def _read_digest(self, row: ImageRow) -> ImageRow:
        """The row with the digest of its image and, for an object in S3, the version that was read."""
        try:
            async with self._images.open(row) as stored:
                row = replace(row, sha256=await asyncio.to_thread(_compute_sha256, stored.data))
                if row.place is None:
                    row = replace(row, version_id=stored.version_id, etag=stored.etag)
        except Unjudgeable as error:
            row = row.with_error(error)
        if row.id:
            return row
        # The intake gives a new object the same id when S3 reports it.
        return replace(row, id=make_s3_submission_id(row.uri.removeprefix("s3://"), row.version_id or row.etag))

    # Tars

    def _read_tar(self, name: str) -> list[ImageRow]:
        uri, rows = self._folder.uri_of(name), list[ImageRow]()
        with self._folder.open(name) as file:
            try:
                for image in read_tar(file):
                    rows.append(self._tar_image(uri, image))
            except TruncatedTar as error:
                rows.append(self._make_unreadable_file_row(name, Malformed(str(error))))
            return [_add_range_digest(row, file) for row in rows]

    def _tar_image(self, tar: str, image: TarImage) -> ImageRow:
        uri = f"{tar}#{quote(image.name, safe='/', errors='surrogateescape')}"
        row = ImageRow(
            id=make_submission_id(uri),
            uri=uri,
            place=FileLocation(tar, image.offset, image.size),
            source_columns={"source_json": json.dumps(image.sidecars) if image.sidecars else None},
        )
        if image.rejection:
            return row.with_error(Forbidden(image.rejection))
        if image.truncated:
            return row.with_error(NotAnImage("the tar is cut off in the middle of the image"))
        return self._check_size(row, image.size)

    # Tables with images

    def _read_table_images(self, shard: SourceShard) -> tuple[list[ImageRow], pa.Table]:
        uri, rows, number = self._folder.uri_of(shard.names[0]), list[ImageRow](), 0
        with self._folder.open(shard.names[0]) as file:
            for batch in read_table_images(file, shard.group, self._source.column or ""):
                for data in batch:
                    if shard.start <= number < shard.end:
                        rows.append(self._make_table_row(uri, shard.group, number, data))
                    number += 1
                if number >= shard.end:
                    break
            return rows, self._read_source_columns(file, shard, len(rows))

    def _make_table_row(self, table: str, group: int, number: int, data: bytes | None) -> ImageRow:
        uri, size = f"{table}#group={group}&row={number}", len(data) if data else 0
        row = ImageRow(id=make_submission_id(uri), uri=uri, place=FileLocation(table, number, size, group))
        if data is None:
            return row.with_error(NotAnImage("the row has no image"))
        row = self._check_size(row, size)
        return row if row.reason else replace(row, sha256=_compute_sha256(data))

    def _check_size(self, row: ImageRow, size: int) -> ImageRow:
        try:
            self._images.check_size(size)
        except TooLarge as error:
            return row.with_error(error)
        return row

    def _read_source_columns(self, file: BinaryIO, shard: SourceShard, count: int) -> pa.Table:
        """The source's own columns, under the names that they have in the annotations."""
        table = pq.ParquetFile(file)
        names = [name for name in table.schema_arrow.names if f"source_{name}" in self._source_columns.names]
        rows = table.read_row_group(shard.group, columns=names).slice(shard.start, count)
        return rows.rename_columns([f"source_{name}" for name in names])

    # Lists of references

    def _read_table_references(self, shard: SourceShard) -> tuple[list[ImageRow], pa.Table]:
        column = self._source.column or ""
        with self._folder.open(shard.names[0]) as file:
            table = pq.ParquetFile(file)
            if column not in table.schema_arrow.names:
                raise Malformed(f"there is no column {column!r}")
            columns = [column, *(name for name in SUBMISSION_COLUMNS if name in table.schema_arrow.names)]
            part = table.read_row_group(shard.group, columns=columns).slice(shard.start, shard.end - shard.start)
            rows = [self._resolve(row.get(column), row) for row in part.to_pylist()]
            return rows, self._read_source_columns(file, shard, len(rows))

    def _read_lines(self, shard: SourceShard) -> list[ImageRow]:
        with self._folder.open(shard.names[0]) as file:
            return [self._parse_line(line) for line in read_lines(file, shard.start, shard.end)]

    def _parse_line(self, line: bytes) -> ImageRow:
        try:
            if len(line) > LINE_LIMIT_BYTES:
                raise Malformed(f"the line is longer than {LINE_LIMIT_BYTES} bytes")
            value = decode_json(line)
            if isinstance(value, str):
                value = {"uri": value}
            if not isinstance(value, dict):
                raise Malformed("the line is neither a JSON object nor a reference")
        except Malformed as error:
            return _make_unreadable_reference_row(line[:_LINE_SHOWN_BYTES].decode(errors="replace"), error)
        column = self._source.column or next((name for name in REFERENCE_COLUMNS if name in value), None)
        row = self._resolve(value.get(column) if column else None, value)
        rest = {name: each for name, each in value.items() if name != column and name not in SUBMISSION_COLUMNS}
        return replace(row, source_columns={"source_json": json.dumps(rest) if rest else None})

    def _resolve(self, reference: Any, columns: Mapping[str, Any]) -> ImageRow:
        try:
            return self._references.resolve(reference, columns)
        except Unjudgeable as error:
            return _make_unreadable_reference_row(str(reference or ""), error)


def _make_unreadable_reference_row(text: str, error: Unjudgeable) -> ImageRow:
    return ImageRow(id=make_submission_id(text), uri=text).with_error(error)


def _add_range_digest(row: ImageRow, file: BinaryIO) -> ImageRow:
    """The row with the digest of its range of an open file, unless the image is known to be unreadable."""
    if row.reason or row.place is None:
        return row
    digest, remaining_bytes = hashlib.sha256(), row.place.size or 0
    file.seek(row.place.offset)
    while remaining_bytes > 0 and (block := file.read(min(remaining_bytes, _BLOCK_BYTES))):
        digest.update(block)
        remaining_bytes -= len(block)
    return replace(row, sha256=digest.hexdigest())


def _compute_sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _to_valid_text(columns: dict[str, Any]) -> dict[str, Any]:
    """Replace characters that UTF-8 cannot encode, such as those of undecodable file names."""
    return {
        name: value.encode(errors="replace").decode() if isinstance(value, str) else value
        for name, value in columns.items()
    }

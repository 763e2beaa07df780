"""Reads the records of a data set one at a time, so memory does not grow with the data set.

A data set is a file (JSON lines; a JSON array, as LlavaGuard's repository writes it; parquet), or a folder in the
layout of Hugging Face: `metadata.jsonl` beside the images, or parquet files, by split.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.clients.local_files import open_local_file
from pipelines.evaluation.labels import RECORD_FIELDS, UnreadableRecord
from services.core.errors import ConfigurationError, OutsideFolder, Unjudgeable

_PARQUET_BATCH_ROWS: Final = 32
"""Rows of a parquet file in memory at a time: with images, some MB."""
_BLOCK_CHARS: Final = 1 << 20
_MAX_RECORD_CHARS: Final = 64 << 20
"""The longest record of a JSON array."""
_LINE_LIMIT_BYTES: Final = 64 << 20
_SPLITS: Final = ("test", "validation", "eval", "train")
_METADATA: Final = "metadata.jsonl"


@dataclass(frozen=True, slots=True)
class DataSet:
    """The files of a data set."""

    name: str
    files: tuple[Path, ...]
    folder: Path
    """The folder that relative paths of images begin at."""
    roots: tuple[Path, ...]
    """The folders whose files may be read. Links are followed, but not out of them."""

    def count(self) -> int | None:
        """The number of records; None if it is unknown without decoding them."""
        total = 0
        for file in self.files:
            with _open(file, self.roots) as data:
                kind = _kind(file, data)
                if kind == "array":
                    return None
                total += _read_table(file, data).metadata.num_rows if kind == "parquet" else _count_lines(file, data)
        return total

    def records(self) -> Iterator[Any]:
        """The decoded records. A record that is not JSON is an `UnreadableRecord`.

        Raises:
            ConfigurationError: a file cannot be read.
        """
        for file in self.files:
            try:
                with _open(file, self.roots) as data:
                    match _kind(file, data):
                        case "parquet":
                            yield from _read_parquet(file, data)
                        case "array":
                            yield from _read_array(file, data)
                        case _:
                            yield from _read_lines(file, data)
            except OSError as error:
                raise ConfigurationError(f"{file} cannot be read: {error.strerror or error}") from None


def open_data_set(path: Path, split: str | None = None, root: Path | None = None) -> DataSet:
    """The data set at a path.

    `split`: the split of a folder with several, such as `train`. By default the first that exists of test, validation,
    eval and train. `root`: a further folder whose files may be read.

    Raises:
        ConfigurationError: there is no data set.
    """
    roots = (path.parent if path.is_file() else path, *((root,) if root else ()))
    if path.is_file():
        with _open(path, roots) as data:
            _kind(path, data)
        return DataSet(path.name, (path,), path.parent, roots)
    if not path.is_dir():
        raise ConfigurationError(f"there is no data set {path}: it is neither a file nor a folder")
    for name in (split,) if split else _SPLITS:
        for folder in (path / name, path / "data" / name):
            if (folder / _METADATA).is_file():
                return DataSet(f"{path.name} ({name})", (folder / _METADATA,), folder, roots)
        for pattern in (f"{name}-*.parquet", f"data/{name}-*.parquet", f"{name}/*.parquet", f"{name}.*"):
            if files := sorted(file for file in path.glob(pattern) if file.suffix in _SUFFIXES):
                return DataSet(f"{path.name} ({name})", tuple(files), path, roots)
    if not split:
        if (path / _METADATA).is_file():
            return DataSet(path.name, (path / _METADATA,), path, roots)
        if files := sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")]):
            return DataSet(path.name, tuple(files), path, roots)
    raise ConfigurationError(
        f"{path} has no {f'split {split}' if split else 'data set'}: name a file of JSON lines or parquet, or a "
        f"folder with {_METADATA} or parquet files"
    )


_SUFFIXES: Final = {".jsonl": "lines", ".ndjson": "lines", ".json": "array", ".parquet": "parquet"}


def _open(file: Path, roots: tuple[Path, ...]) -> BinaryIO:
    try:
        return open_local_file(file, roots)
    except OutsideFolder as error:
        raise ConfigurationError(f"{error}; allow another folder with --root") from None
    except Unjudgeable as error:
        raise ConfigurationError(str(error)) from None


def _kind(file: Path, data: BinaryIO) -> str:
    """The kind of an open file, whose position is then its beginning."""
    kind = _SUFFIXES.get(file.suffix.lower())
    if kind is None:
        raise ConfigurationError(f"{file} is not a data set: its suffix has to be .jsonl, .json or .parquet")
    if kind == "array":
        try:
            kind = "array" if data.read(64).lstrip()[:1] == b"[" else "lines"
            data.seek(0)
        except OSError as error:
            raise ConfigurationError(f"{file} cannot be read: {error.strerror}") from None
    return kind


def _count_lines(file: Path, data: BinaryIO) -> int:
    return sum(1 for _ in _split_lines(file, data))


def _split_lines(file: Path, data: BinaryIO) -> Iterator[bytes]:
    """The lines without empty ones. A line without end in the file of somebody else must not fill the memory."""
    while line := data.readline(_LINE_LIMIT_BYTES + 1):
        if len(line) > _LINE_LIMIT_BYTES:
            raise ConfigurationError(
                f"{file} has a line of more than {_LINE_LIMIT_BYTES:,} bytes and is not read further; split or remove "
                "the line"
            )
        if line.strip():
            yield line


def _read_table(file: Path, data: BinaryIO) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(data)
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigurationError(f"{file} is not a readable parquet file: {error}") from None


def _read_parquet(file: Path, data: BinaryIO) -> Iterator[Any]:
    table = _read_table(file, data)
    columns = [name for name in table.schema_arrow.names if name in RECORD_FIELDS]
    try:
        for batch in table.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=columns):
            yield from batch.to_pylist()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ConfigurationError(f"{file} cannot be read to its end: {error}") from None


def _read_lines(file: Path, data: BinaryIO) -> Iterator[Any]:
    for line in _split_lines(file, data):
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            yield UnreadableRecord(f"is not JSON in UTF-8: {error}")


def _read_array(file: Path, data: BinaryIO) -> Iterator[Any]:
    """The elements of one JSON array, read in blocks."""
    decoder, text, ended = json.JSONDecoder(), "", False
    with io.TextIOWrapper(data, encoding="utf-8") as blocks:
        try:
            text = blocks.read(_BLOCK_CHARS).lstrip().removeprefix("[")
            while True:
                text = text.lstrip().removeprefix(",").lstrip()
                if text.startswith("]"):
                    return
                try:
                    element, end = decoder.raw_decode(text)
                except ValueError:
                    if ended or len(text) > _MAX_RECORD_CHARS:
                        raise
                    # Probably the element is not read to its end. Blocks grow, so the number of attempts stays small.
                    block = blocks.read(max(_BLOCK_CHARS, len(text)))
                    text, ended = text + block, not block
                    continue
                yield element
                text = text[end:]
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(f"{file} is not a JSON array in UTF-8: {error}") from None

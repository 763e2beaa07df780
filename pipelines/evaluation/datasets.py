"""Reads the records of a data set one at a time, so memory does not grow with the data set.

A data set is a file (JSON lines; a JSON array, as LlavaGuard's repository writes it; parquet), or a folder in the
layout of Hugging Face: `metadata.jsonl` beside the images, or parquet files, by split.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.evaluation.labels import RECORD_FIELDS, UnreadableRecord
from services.core.errors import ConfigurationError

_PARQUET_BATCH_ROWS: Final = 32
"""Rows of a parquet file in memory at a time: with images, some MB."""
_BLOCK_CHARS: Final = 1 << 20
_MAX_RECORD_CHARS: Final = 64 << 20
"""The longest record of a JSON array."""
_SPLITS: Final = ("test", "validation", "eval", "train")
_METADATA: Final = "metadata.jsonl"


@dataclass(frozen=True, slots=True)
class DataSet:
    """The files of a data set."""

    name: str
    files: tuple[Path, ...]
    folder: Path
    """The folder that relative paths of images begin at."""

    def count(self) -> int | None:
        """The number of records; None if it is unknown without decoding them."""
        if not all(_kind(file) == "parquet" for file in self.files):
            return None if any(_kind(file) == "array" for file in self.files) else sum(map(_count_lines, self.files))
        return sum(int(_open_parquet(file).metadata.num_rows) for file in self.files)

    def records(self) -> Iterator[Any]:
        """The decoded records. A record that is not JSON is an `UnreadableRecord`.

        Raises:
            ConfigurationError: a file cannot be read.
        """
        for file in self.files:
            read = {"parquet": _read_parquet, "array": _read_array, "lines": _read_lines}[_kind(file)]
            try:
                yield from read(file)
            except OSError as error:
                raise ConfigurationError(f"{file} cannot be read: {error.strerror or error}") from None


def open_data_set(path: Path, split: str | None = None) -> DataSet:
    """The data set at a path.

    `split`: the split of a folder with several, such as `train`. By default the first that exists of test, validation,
    eval and train.

    Raises:
        ConfigurationError: there is no data set.
    """
    if path.is_file():
        _kind(path)
        return DataSet(path.name, (path,), path.parent)
    if not path.is_dir():
        raise ConfigurationError(f"there is no data set {path}: it is neither a file nor a folder")
    for name in (split,) if split else _SPLITS:
        for folder in (path / name, path / "data" / name):
            if (folder / _METADATA).is_file():
                return DataSet(f"{path.name} ({name})", (folder / _METADATA,), folder)
        for pattern in (f"{name}-*.parquet", f"data/{name}-*.parquet", f"{name}/*.parquet", f"{name}.*"):
            if files := sorted(file for file in path.glob(pattern) if file.suffix in _SUFFIXES):
                return DataSet(f"{path.name} ({name})", tuple(files), path)
    if not split:
        if (path / _METADATA).is_file():
            return DataSet(path.name, (path / _METADATA,), path)
        if files := sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")]):
            return DataSet(path.name, tuple(files), path)
    raise ConfigurationError(
        f"{path} has no {f'split {split}' if split else 'data set'}: name a file of JSON lines or parquet, or a "
        f"folder with {_METADATA} or parquet files"
    )


_SUFFIXES: Final = {".jsonl": "lines", ".ndjson": "lines", ".json": "array", ".parquet": "parquet"}


def _kind(file: Path) -> str:
    kind = _SUFFIXES.get(file.suffix.lower())
    if kind is None:
        raise ConfigurationError(f"{file} is not a data set: its suffix has to be .jsonl, .json or .parquet")
    if kind == "array":
        try:
            with file.open("rb") as data:
                return "array" if data.read(64).lstrip()[:1] == b"[" else "lines"
        except OSError as error:
            raise ConfigurationError(f"{file} cannot be read: {error.strerror}") from None
    return kind


def _count_lines(file: Path) -> int:
    with file.open("rb") as data:
        return sum(1 for line in data if line.strip())


def _open_parquet(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigurationError(f"{file} is not a readable parquet file: {error}") from None


def _read_parquet(file: Path) -> Iterator[Any]:
    table = _open_parquet(file)
    columns = [name for name in table.schema_arrow.names if name in RECORD_FIELDS]
    try:
        for batch in table.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=columns):
            yield from batch.to_pylist()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ConfigurationError(f"{file} cannot be read to its end: {error}") from None


def _read_lines(file: Path) -> Iterator[Any]:
    with file.open("rb") as lines:
        for line in lines:
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield UnreadableRecord(f"is not JSON in UTF-8: {error}")


def _read_array(file: Path) -> Iterator[Any]:
    """The elements of one JSON array, read in blocks."""
    decoder, text, ended = json.JSONDecoder(), "", False
    with file.open(encoding="utf-8") as blocks:
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

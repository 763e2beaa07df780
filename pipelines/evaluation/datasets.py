"""The records of a data set, one at a time: a file or a folder is never held in memory as a whole.

A data set is a file (JSON lines, a JSON array as LlavaGuard's repository writes it, parquet), or a folder as Hugging
Face keeps it: `metadata.jsonl` beside the images, or parquet files, by split.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.evaluation.labels import COLUMNS, UnreadableRecord
from services.core.errors import ConfigurationError

_BATCH: Final = 32
"""Rows of a parquet file read at a time: with images, some MB."""
_CHUNK: Final = 1 << 20
_RECORD_LIMIT: Final = 64 << 20
"""Characters of one record in a JSON file."""
_SPLITS: Final = ("test", "validation", "eval", "train")
_METADATA: Final = "metadata.jsonl"


@dataclass(frozen=True, slots=True)
class DataSet:
    """Where the records are."""

    name: str
    files: tuple[Path, ...]
    folder: Path
    """What relative paths of images begin at."""

    def count(self) -> int | None:
        """How many records there are, where that can be told without decoding them."""
        if not all(_kind(file) == "parquet" for file in self.files):
            return None if any(_kind(file) == "array" for file in self.files) else sum(map(_lines, self.files))
        return sum(int(_parquet(file).metadata.num_rows) for file in self.files)

    def records(self) -> Iterator[Any]:
        """Decoded records, or `UnreadableRecord` where one is no JSON.

        Raises:
            ConfigurationError: a file cannot be read.
        """
        for file in self.files:
            reading = {"parquet": _from_parquet, "array": _from_array, "lines": _from_lines}[_kind(file)]
            try:
                yield from reading(file)
            except OSError as error:
                raise ConfigurationError(f"{file} cannot be read: {error.strerror or error}") from None


def open_data_set(place: Path, split: str | None = None) -> DataSet:
    """The data set at a path.

    `split`: of a folder with several, such as `train`; the first there is of test, validation, eval and train unless
    given.

    Raises:
        ConfigurationError: there is none.
    """
    if place.is_file():
        _kind(place)
        return DataSet(place.name, (place,), place.parent)
    if not place.is_dir():
        raise ConfigurationError(f"there is no data set {place}: it is neither a file nor a folder")
    for name in (split,) if split else _SPLITS:
        for folder in (place / name, place / "data" / name):
            if (folder / _METADATA).is_file():
                return DataSet(f"{place.name} ({name})", (folder / _METADATA,), folder)
        for pattern in (f"{name}-*.parquet", f"data/{name}-*.parquet", f"{name}/*.parquet", f"{name}.*"):
            if files := sorted(file for file in place.glob(pattern) if file.suffix in _SUFFIXES):
                return DataSet(f"{place.name} ({name})", tuple(files), place)
    if not split:
        if (place / _METADATA).is_file():
            return DataSet(place.name, (place / _METADATA,), place)
        if files := sorted([*place.glob("*.parquet"), *place.glob("data/*.parquet")]):
            return DataSet(place.name, tuple(files), place)
    raise ConfigurationError(
        f"{place} has no {f'split {split}' if split else 'data set'}: name a file of JSON lines or parquet, or a "
        f"folder with {_METADATA} or parquet files"
    )


_SUFFIXES: Final = {".jsonl": "lines", ".ndjson": "lines", ".json": "array", ".parquet": "parquet"}


def _kind(file: Path) -> str:
    kind = _SUFFIXES.get(file.suffix.lower())
    if kind is None:
        raise ConfigurationError(f"{file} is no data set: it has to be .jsonl, .json or .parquet")
    if kind == "array":
        try:
            with file.open("rb") as data:
                return "array" if data.read(64).lstrip()[:1] == b"[" else "lines"
        except OSError as error:
            raise ConfigurationError(f"{file} cannot be read: {error.strerror}") from None
    return kind


def _lines(file: Path) -> int:
    with file.open("rb") as data:
        return sum(1 for line in data if line.strip())


def _parquet(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigurationError(f"{file} is no parquet file that can be read: {error}") from None


def _from_parquet(file: Path) -> Iterator[Any]:
    table = _parquet(file)
    columns = [name for name in table.schema_arrow.names if name in COLUMNS]
    try:
        for batch in table.iter_batches(batch_size=_BATCH, columns=columns):
            yield from batch.to_pylist()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ConfigurationError(f"{file} cannot be read to its end: {error}") from None


def _from_lines(file: Path) -> Iterator[Any]:
    with file.open("rb") as lines:
        for line in lines:
            if line.strip():
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield UnreadableRecord(f"is no JSON in UTF-8: {error}")


def _from_array(file: Path) -> Iterator[Any]:
    """The elements of one JSON array, read a piece at a time."""
    decoder, text, ended = json.JSONDecoder(), "", False
    with file.open(encoding="utf-8") as pieces:
        try:
            text = pieces.read(_CHUNK).lstrip().removeprefix("[")
            while True:
                text = text.lstrip().removeprefix(",").lstrip()
                if text.startswith("]"):
                    return
                try:
                    element, end = decoder.raw_decode(text)
                except ValueError:
                    if ended or len(text) > _RECORD_LIMIT:
                        raise
                    # Most likely the rest of the element has not been read; a larger piece each time bounds the work.
                    piece = pieces.read(max(_CHUNK, len(text)))
                    text, ended = text + piece, not piece
                    continue
                yield element
                text = text[end:]
        except (ValueError, RecursionError) as error:
            raise ConfigurationError(f"{file} is no JSON array in UTF-8: {error}") from None

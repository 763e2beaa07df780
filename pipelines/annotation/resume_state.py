"""The files in the output folder of `sluice annotate` from which a killed run resumes.

    _sluice/run.json              the source, policy and model of the run; written first, and never changed
    _sluice/listing/.../000123.json  shards of the source; listing.json is written after the last one and locates them
    _sluice/index/000123.parquet  the images of a shard, with their digests
    _sluice/plan/000123.parquet   the rows of a chunk; plan.json is written after the last one
    _sluice/chunks/000123.parquet the annotations of a chunk: the chunk is done once the file exists
    outcome=.../rating=.../part-00012.parquet   the annotations, written from the chunks at the end
    _summary.json, _summary.html  written last

Every file is written whole or not at all. Files that later steps read (run, listing, index, plan, chunks) are never
overwritten. So a new run resumes a killed one, even while some of its workers are still alive: if two workers judge the
same chunk, the first file counts. The steps in run.py skip the work whose files exist. pyarrow, Spark and Ray do not
read files as data whose names begin with _.
"""

import base64
import json
import re
import uuid
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, Final, Literal

import pyarrow as pa

from pipelines.annotation.chunks import AnnotationPlan
from pipelines.annotation.schema import from_parquet
from pipelines.annotation.sources.discover import SourceShard
from pipelines.annotation.storage import Folder
from services.core.errors import ConfigurationError, SluiceError

Stage = Literal["index", "plan", "chunks"]
"""The steps of a run that store tables: the index, the plan, and the judged chunks."""

FORMAT: Final = 1
STATE: Final = "_sluice"
SUMMARY: Final = "_summary.json"
PAGE: Final = "_summary.html"
_RUN: Final = f"{STATE}/run.json"
_LISTING: Final = f"{STATE}/listing.json"
_PLAN: Final = f"{STATE}/plan.json"
_TEMPORARY: Final = ("listing", "index", "plan", "chunks")
_LISTING_FILE_SHARDS: Final = 200
_LISTING_FILE_NAMES: Final = 5_000
_NUMBERED: Final = re.compile(r"(\d{6,})\.parquet")


@dataclass(frozen=True, slots=True)
class Listing:
    """Where the shards of the source are stored, as they were when the run began."""

    folder: str
    firsts: tuple[int, ...]
    """The number of the first shard in each file of the folder."""
    shards: int
    source_columns: pa.Schema
    """The source's own columns."""


class RunState:
    """The files of one run."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def begin(self, description: Mapping[str, Any]) -> dict[str, Any]:
        """Store the description of a new run, or check it against the run in this folder. Returns the stored one.

        Raises:
            ConfigurationError: the folder has another run, or something else.
        """
        description = {"format": FORMAT, **description}
        if (stored := self.read_description()) is None:
            entry = next(iter(self.folder.entries()), None)
            if entry is not None and not entry.name.startswith(f"{STATE}/"):
                raise ConfigurationError(
                    f"{self.folder.uri} has other files than annotations ({entry.name}); name another folder with --out"
                )
            self.folder.create(_RUN, json.dumps(description, indent=1).encode())
            stored = self.read_description() or {}
        for name, value in description.items():
            if stored.get(name) != value:
                raise ConfigurationError(
                    f"{self.folder.uri} has annotations of another run: its {name} is "
                    f"{_to_text(stored.get(name))}, not {_to_text(value)}; name another folder with --out, or empty "
                    "this one to start again"
                )
        return stored

    def read_description(self) -> dict[str, Any] | None:
        """The description of the run in this folder; None if there is no run."""
        description: dict[str, Any] | None = self._read_json(_RUN)
        return description

    def save_listing(self, shards: Iterator[SourceShard], source_columns: pa.Schema) -> Listing:
        """Store the shards, unless an earlier run stored them."""
        if (listing := self.read_listing()) is not None:
            return listing
        # Each attempt has its own folder, because the source may have changed since an earlier attempt.
        below = f"{STATE}/listing/{uuid.uuid4().hex}"
        firsts, total = list[int](), 0
        for batch in _batch_shards(shards):
            text = json.dumps([shard.to_json() for shard in batch])
            self.folder.create(f"{below}/{total:06d}.json", text.encode())
            firsts.append(total)
            total += len(batch)
        schema = base64.b64encode(source_columns.serialize().to_pybytes()).decode()
        # `pieces` is the name that Sluice 0.1.0 gave to shards.
        kept = {"folder": below, "firsts": firsts, "pieces": total, "extras": schema}
        self.folder.create(_LISTING, json.dumps(kept).encode())
        return self.read_listing() or Listing(below, tuple(firsts), total, source_columns)

    def read_listing(self) -> Listing | None:
        """Where the shards are stored; None if they are not complete."""
        if (kept := self._read_json(_LISTING)) is None:
            return None
        source_columns = pa.ipc.read_schema(pa.BufferReader(base64.b64decode(kept["extras"])))
        return Listing(kept["folder"], tuple(kept["firsts"]), kept["pieces"], source_columns)

    def read_shard(self, listing: Listing, number: int) -> SourceShard:
        """Read one shard."""
        first = listing.firsts[bisect_right(listing.firsts, number) - 1]
        return SourceShard.from_json(self._read_json(f"{listing.folder}/{first:06d}.json")[number - first])

    def save_plan(self, plan: AnnotationPlan) -> None:
        """Mark the plan as complete."""
        self.folder.create(_PLAN, json.dumps(asdict(plan)).encode())

    def read_plan(self) -> AnnotationPlan | None:
        """The size of the run; None if the plan is not complete."""
        kept = self._read_json(_PLAN)
        return AnnotationPlan(**kept) if kept else None

    def save_table(self, stage: Stage, name: str, parquet: bytes) -> None:
        """Write a file of a stage, unless it exists."""
        self.folder.create(f"{STATE}/{stage}/{name}.parquet", parquet)

    def read_table(self, stage: Stage, name: str) -> Iterator[pa.Table] | None:
        """The rows of a file of a stage, in batches; None if it does not exist."""
        data = self.folder.read(f"{STATE}/{stage}/{name}.parquet")
        return None if data is None else from_parquet(data)

    def list_finished(self, stage: Stage) -> set[int]:
        """The numbers of the shards in the index, or of the judged chunks."""
        below = f"{STATE}/{stage}"
        names = (entry.name.removeprefix(f"{below}/") for entry in self.folder.entries(below))
        return {int(match[1]) for name in names if (match := _NUMBERED.fullmatch(name))}

    def read_planned(self, chunk: int) -> Iterator[pa.Table]:
        """The rows of a chunk in their order, in batches."""
        parts = [self.read_table("plan", name) for name in (f"{chunk:06d}", f"{chunk:06d}-late")]
        if not (found := [part for part in parts if part is not None]):
            raise self._make_missing_chunk_error(chunk)
        return chain.from_iterable(found)

    def read_judged(self, chunk: int) -> Iterator[pa.Table]:
        """The annotations of a chunk, in batches."""
        if (annotations := self.read_table("chunks", f"{chunk:06d}")) is None:
            raise self._make_missing_chunk_error(chunk)
        return annotations

    def read_summary(self) -> dict[str, Any] | None:
        """The summary of the run; None if the run is not complete."""
        summary: dict[str, Any] | None = self._read_json(SUMMARY)
        return summary

    def delete_temporary(self) -> None:
        """Remove the files that a complete run does not need."""
        for name in _TEMPORARY:
            self.folder.remove(f"{STATE}/{name}")

    def _make_missing_chunk_error(self, chunk: int) -> SluiceError:
        return SluiceError(
            f"chunk {chunk} of {self.folder.uri} is missing: another run finished, or someone removed it; run the "
            "command again"
        )

    def _read_json(self, name: str) -> Any:
        data = self.folder.read(name)
        return None if data is None else json.loads(data)


def _batch_shards(shards: Iterator[SourceShard]) -> Iterator[list[SourceShard]]:
    batch, names = list[SourceShard](), 0
    for shard in shards:
        batch.append(shard)
        names += len(shard.names)
        if len(batch) >= _LISTING_FILE_SHARDS or names >= _LISTING_FILE_NAMES:
            yield batch
            batch, names = [], 0
    if batch:
        yield batch


def _to_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)

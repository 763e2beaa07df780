"""What a run of `sluice annotate` has done so far, in the folder that it writes to.

    _sluice/run.json              what the run is about; written first, and never changed
    _sluice/listing/.../000123.json  pieces of the source; listing.json follows the last one and says where they are
    _sluice/index/000123.parquet  the images of a piece, with their digests
    _sluice/plan/000123.parquet   the rows of a chunk; plan.json follows the last one
    _sluice/chunks/000123.parquet the annotations of a chunk: it is done when the file is there, and not before
    outcome=.../rating=.../part-00012.parquet   the annotations, made of the chunks at the end
    _summary.json, _summary.html  written last

Every file is written whole or not at all, and what others build upon (run, listing, index, plan, chunks) only where
there is none yet. So whenever a run is killed, and whoever of it lives on for a while, the next one goes on with what
is there; a chunk that two worked on is that of the one who came first, for everyone. Names that begin with _ are not
read as data by pyarrow, Spark and Ray.
"""

import base64
import json
import re
import uuid
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, Final

import pyarrow as pa

from pipelines.annotation.chunks import AnnotationPlan
from pipelines.annotation.schema import from_parquet
from pipelines.annotation.sources.discover import SourceShard
from pipelines.annotation.storage import Folder
from services.core.errors import ConfigurationError, SluiceError

FORMAT: Final = 1
STATE: Final = "_sluice"
SUMMARY: Final = "_summary.json"
PAGE: Final = "_summary.html"
_RUN: Final = f"{STATE}/run.json"
_LISTING: Final = f"{STATE}/listing.json"
_PLAN: Final = f"{STATE}/plan.json"
_SCRATCH: Final = ("listing", "index", "plan", "chunks")
_LISTING_FILE_SHARDS: Final = 200
_LISTING_FILE_NAMES: Final = 5_000
_NUMBERED: Final = re.compile(r"(\d{6,})\.parquet")


@dataclass(frozen=True, slots=True)
class Listing:
    """The pieces of the source, as they were when the run began."""

    folder: str
    firsts: tuple[int, ...]
    """The number of the first piece in each file of the folder."""
    shards: int
    extras: pa.Schema
    """Of the source's own columns."""


class RunState:
    """The files of one run."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def begin(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """Say what the run is about, or find that it has begun; what it said then.

        Raises:
            ConfigurationError: the folder holds something else.
        """
        about = {"format": FORMAT, **about}
        if (begun := self.about()) is None:
            entry = next(iter(self.folder.entries()), None)
            if entry is not None and not entry.name.startswith(f"{STATE}/"):
                raise ConfigurationError(
                    f"{self.folder.uri} is not empty, and not with annotations ({entry.name}); say another --out"
                )
            self.folder.create(_RUN, json.dumps(about, indent=1).encode())
            begun = self.about() or {}
        for name, value in about.items():
            if begun.get(name) != value:
                raise ConfigurationError(
                    f"{self.folder.uri} holds annotations of another run: its {name} is {_shown(begun.get(name))}, not "
                    f"{_shown(value)}; say another --out, or empty that folder to begin anew"
                )
        return begun

    def about(self) -> dict[str, Any] | None:
        """What a run in this folder is about, None where there is none."""
        about: dict[str, Any] | None = self._json(_RUN)
        return about

    def keep_listing(self, shards: Iterator[SourceShard], extras: pa.Schema) -> Listing:
        """Write down the pieces, unless that was done before."""
        if (listing := self.listing()) is not None:
            return listing
        # A folder of its own for each attempt: the source may have changed since an earlier one.
        below = f"{STATE}/listing/{uuid.uuid4().hex}"
        firsts, total = list[int](), 0
        for some in _batched(shards):
            text = json.dumps([shard.to_json() for shard in some])
            self.folder.create(f"{below}/{total:06d}.json", text.encode())
            firsts.append(total)
            total += len(some)
        schema = base64.b64encode(extras.serialize().to_pybytes()).decode()
        kept = {"folder": below, "firsts": firsts, "pieces": total, "extras": schema}
        self.folder.create(_LISTING, json.dumps(kept).encode())
        return self.listing() or Listing(below, tuple(firsts), total, extras)

    def listing(self) -> Listing | None:
        """The pieces, None where they are not complete."""
        if (kept := self._json(_LISTING)) is None:
            return None
        extras = pa.ipc.read_schema(pa.BufferReader(base64.b64decode(kept["extras"])))
        return Listing(kept["folder"], tuple(kept["firsts"]), kept["pieces"], extras)

    def shard(self, listing: Listing, number: int) -> SourceShard:
        """One of the pieces."""
        first = listing.firsts[bisect_right(listing.firsts, number) - 1]
        return SourceShard.from_json(self._json(f"{listing.folder}/{first:06d}.json")[number - first])

    def keep_plan(self, plan: AnnotationPlan) -> None:
        """Say that the chunks are complete."""
        self.folder.create(_PLAN, json.dumps(asdict(plan)).encode())

    def plan(self) -> AnnotationPlan | None:
        """What there is to do, None where that is not known yet."""
        kept = self._json(_PLAN)
        return AnnotationPlan(**kept) if kept else None

    def keep(self, what: str, name: str, parquet: bytes) -> None:
        """Write a file of `index`, `plan` or `chunks`, unless there is one."""
        self.folder.create(f"{STATE}/{what}/{name}.parquet", parquet)

    def rows(self, what: str, name: str) -> Iterator[pa.Table] | None:
        """What one of those files holds, some rows at a time; None where there is none."""
        data = self.folder.read(f"{STATE}/{what}/{name}.parquet")
        return None if data is None else from_parquet(data)

    def done(self, what: str) -> set[int]:
        """The numbers of the tables of `index` or `chunks` that are there."""
        below = f"{STATE}/{what}"
        names = (entry.name.removeprefix(f"{below}/") for entry in self.folder.entries(below))
        return {int(match[1]) for name in names if (match := _NUMBERED.fullmatch(name))}

    def planned(self, chunk: int) -> Iterator[pa.Table]:
        """The rows of a chunk, some at a time and in their order."""
        parts = [self.rows("plan", name) for name in (f"{chunk:06d}", f"{chunk:06d}-late")]
        if not (found := [part for part in parts if part is not None]):
            raise SluiceError(f"the plan of {self.folder.uri} is gone; another run has finished it, or it was removed")
        return chain.from_iterable(found)

    def summary(self) -> dict[str, Any] | None:
        """What came of the run, None where it is not complete."""
        summary: dict[str, Any] | None = self._json(SUMMARY)
        return summary

    def delete_temporary(self) -> None:
        """Remove what a complete run needs no more."""
        for what in _SCRATCH:
            self.folder.remove(f"{STATE}/{what}")

    def _json(self, name: str) -> Any:
        data = self.folder.read(name)
        return None if data is None else json.loads(data)


def _batched(shards: Iterator[SourceShard]) -> Iterator[list[SourceShard]]:
    some, names = list[SourceShard](), 0
    for shard in shards:
        some.append(shard)
        names += len(shard.names)
        if len(some) >= _LISTING_FILE_SHARDS or names >= _LISTING_FILE_NAMES:
            yield some
            some, names = [], 0
    if some:
        yield some


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)

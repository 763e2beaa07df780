"""Every write of a run is the last one once: the next run finishes it, with no row twice and none missing. No Ray."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.annotation import ray_workers as cluster
from pipelines.annotation import summary, workers
from pipelines.annotation.options import AnnotateOptions
from pipelines.annotation.run import annotate
from pipelines.annotation.schema import from_parquet, to_parquet
from pipelines.annotation.state import RunState
from pipelines.annotation.storage import LocalFolder
from services.core.errors import NotAnImage
from services.core.settings import Settings
from services.core.values import Assessment, ImageFacts, PreparedImage
from tests.support.annotation_service import assessment
from tests.support.data_set_images import picture, tar
from tests.support.fake_guard import FakeGuard

SETTINGS = Settings(model="tiny")
IMAGES = 10


class Crash(BaseException):
    """The process is gone."""


class Fuse:
    """Ends the process just before its nth write."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.writes = -1, 0
        for name in ("create", "put", "remove"):
            monkeypatch.setattr(LocalFolder, name, self._burning(getattr(LocalFolder, name)))

    def _burning(self, write: Any) -> Any:
        def burning(folder: LocalFolder, *arguments: Any) -> Any:
            self.writes += 1
            self.left -= 1
            if self.left == 0:
                raise Crash
            return write(folder, *arguments)

        return burning


class Guard(FakeGuard):
    """Says something else each time, so that two versions of a chunk would be told apart."""

    turn = 0

    async def max_side_px(self) -> int:
        return 384

    async def assess_each(self, image: PreparedImage, *_: Any) -> list[Assessment]:
        Guard.turn += 1
        return [assessment(f"{Guard.turn * 0x2F000000 % 2**32:08x}00")]


class DecoderPool:
    def __init__(self, *_: Any) -> None:
        pass

    async def prepare(self, data: bytes) -> PreparedImage:
        if not data.startswith(b"\x89PNG"):
            raise NotAnImage("no PNG")
        facts = ImageFacts(width=8, height=8, format="png")
        return PreparedImage(data, "image/png", 8, 8, hashlib.sha256(data).hexdigest(), facts)


@contextmanager
def nothing(*_: Any) -> Iterator[cluster.Pool]:
    yield cluster.Pool("none", 1)


def run_units(worker: type[Any], arguments: Mapping[str, Any], units: Sequence[int], placement: Any = None) -> Any:
    """Without Ray, the last unit first."""

    async def work(unit: int) -> dict[str, Any]:
        done: dict[str, Any] = await worker(**arguments).work(unit)
        return done

    for unit in sorted(units, reverse=True):
        yield asyncio.run(work(unit))


@pytest.fixture
def fuse(monkeypatch: pytest.MonkeyPatch) -> Fuse:
    monkeypatch.setattr(cluster, "joined", nothing)
    monkeypatch.setattr(cluster, "guard", nothing)
    monkeypatch.setattr(cluster, "run_units", run_units)
    monkeypatch.setattr(cluster, "run_here", run_units)
    monkeypatch.setattr(workers.RemoteGuard, "from_settings", lambda *_: Guard())
    monkeypatch.setattr(workers.serve, "get_deployment_handle", lambda *_: None)
    monkeypatch.setattr(workers, "DecoderPool", DecoderPool)
    monkeypatch.setattr(summary, "page", lambda _: "")  # it takes longer than all the rest
    return Fuse(monkeypatch)


@pytest.fixture
def options(tmp_path: Path) -> AnnotateOptions:
    shards = tmp_path / "shards"
    shards.mkdir()
    images = [(f"{n:02d}.png", picture(n % 7) if n != 3 else b"no image") for n in range(IMAGES)]
    tar(shards / "0.tar", images[:6])
    tar(shards / "1.tar", images[6:])
    return AnnotateOptions(str(shards), str(tmp_path / "out"), "default", chunk_rows=4)


def attempt(options: AnnotateOptions) -> dict[str, Any] | None:
    """The summary, None where it did not come so far."""
    try:
        return annotate(options, SETTINGS, lambda _: None)[0]
    except Crash:
        return None


def check(options: AnnotateOptions, done: dict[str, Any]) -> None:
    rows = pq.read_table(options.out).to_pylist()
    assert sorted(row["row"] for row in rows) == list(range(IMAGES))
    assert Counter(row["outcome"] for row in rows) == done["outcome"] == {"verdict": IMAGES - 1, "dead_letter": 1}
    by_digest: dict[str, set[float]] = {}
    for row in rows:
        by_digest.setdefault(row["sha256"], set()).add(row["score"])
    assert all(len(scores) == 1 for scores in by_digest.values()), "the same bytes, another verdict"
    left = {file.name for file in (Path(options.out) / "_sluice").rglob("*") if file.is_file()}
    assert left == {"lock", "run.json", "listing.json", "plan.json"}


def test_a_crash_at_every_write(fuse: Fuse, options: AnnotateOptions, tmp_path: Path) -> None:
    done = attempt(options)
    assert done is not None
    check(options, done)
    writes = fuse.writes
    assert writes > 15
    for nth in range(1, writes + 1):
        again = AnnotateOptions(options.source, str(tmp_path / f"out-{nth}"), "default", chunk_rows=4)
        fuse.left = nth
        assert attempt(again) is None, "it did not crash"
        fuse.left = -1
        done = attempt(again)
        assert done is not None
        check(again, done)


def test_a_crash_at_every_write_of_every_attempt(fuse: Fuse, options: AnnotateOptions) -> None:
    """A few more writes each time, until it is done."""
    attempts, done = 0, None
    while done is None:
        fuse.left = 3 + attempts // 12
        done, attempts = attempt(options), attempts + 1
        assert attempts < 500
    fuse.left = -1
    check(options, done)
    assert attempts > 5


def test_who_lives_on_changes_nothing(fuse: Fuse, options: AnnotateOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of a killed run write their chunks while the next run publishes: nobody takes notice."""
    late: list[tuple[RunState, str, bytes]] = []
    keep, put = RunState.keep, LocalFolder.put

    def kept_twice(run: RunState, what: str, name: str, parquet: bytes) -> None:
        keep(run, what, name, parquet)
        for table in from_parquet(parquet) if what == "chunks" else ():
            scores = [None if score is None else 0.123 for score in table.column("score").to_pylist()]
            index = table.column_names.index("score")
            late.append((run, name, to_parquet(table.set_column(index, "score", [scores]))))

    def put_after_others(folder: LocalFolder, name: str, data: bytes) -> None:
        for run, chunk, parquet in late:
            keep(run, "chunks", chunk, parquet)
        put(folder, name, data)

    monkeypatch.setattr(RunState, "keep", kept_twice)
    monkeypatch.setattr(LocalFolder, "put", put_after_others)
    done = attempt(options)
    assert done is not None
    check(options, done)
    assert 0.123 not in [row["score"] for row in pq.read_table(options.out).to_pylist()]


def test_another_filter_comes_later(fuse: Fuse, options: AnnotateOptions) -> None:
    first = attempt(options)
    writes = fuse.writes
    assert attempt(options) == first
    assert fuse.writes <= writes + 4, "a run that is complete is not done again"

"""A run is killed at every write in turn. The next run finishes it, with no row repeated or missing. No Ray."""

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.annotation.options import AnnotateOptions
from pipelines.annotation.resume_state import RunState, Stage
from pipelines.annotation.run import annotate
from pipelines.annotation.schema import from_parquet, to_parquet
from pipelines.annotation.storage import LocalFolder
from services.core.settings import Settings
from services.core.values import Assessment, PreparedImage
from tests.support.annotation_service import assessment
from tests.support.annotation_without_ray import annotate_without_ray
from tests.support.data_set_images import picture, tar
from tests.support.fake_guard import FakeGuard

SETTINGS = Settings(model="tiny")
IMAGES = 10


class Crash(BaseException):
    """Stands for the death of the process."""


class CrashAtWrite:
    """Raises Crash instead of the nth write."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.writes = -1, 0
        for name in ("create", "put", "remove"):
            monkeypatch.setattr(LocalFolder, name, self._counted(getattr(LocalFolder, name)))

    def _counted(self, write: Any) -> Any:
        def write_or_crash(folder: LocalFolder, *arguments: Any) -> Any:
            self.writes += 1
            self.left -= 1
            if self.left == 0:
                raise Crash
            return write(folder, *arguments)

        return write_or_crash


class ChangingGuard(FakeGuard):
    """Gives another answer each time, so that two versions of a chunk differ."""

    calls_made = 0

    async def max_side_px(self) -> int:
        return 384

    async def assess_each(self, image: PreparedImage, *_: Any) -> list[Assessment]:
        ChangingGuard.calls_made += 1
        return [assessment(f"{ChangingGuard.calls_made * 0x2F000000 % 2**32:08x}00")]


@pytest.fixture
def crash(monkeypatch: pytest.MonkeyPatch) -> CrashAtWrite:
    annotate_without_ray(monkeypatch, ChangingGuard)
    return CrashAtWrite(monkeypatch)


@pytest.fixture
def options(tmp_path: Path) -> AnnotateOptions:
    shards = tmp_path / "shards"
    shards.mkdir()
    images = [(f"{n:02d}.png", picture(n % 7) if n != 3 else b"no image") for n in range(IMAGES)]
    tar(shards / "0.tar", images[:6])
    tar(shards / "1.tar", images[6:])
    return AnnotateOptions(str(shards), str(tmp_path / "out"), "default", chunk_rows=4)


def attempt(options: AnnotateOptions) -> dict[str, Any] | None:
    """The summary; None if the run crashed."""
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
    assert all(len(scores) == 1 for scores in by_digest.values()), "the same bytes have one verdict"
    left = {file.name for file in (Path(options.out) / "_sluice").rglob("*") if file.is_file()}
    assert left == {"lock", "run.json", "listing.json", "plan.json"}


def test_crash_at_each_write_next_run_finishes(crash: CrashAtWrite, options: AnnotateOptions, tmp_path: Path) -> None:
    done = attempt(options)
    assert done is not None
    check(options, done)
    writes = crash.writes
    assert writes > 15
    for nth in range(1, writes + 1):
        again = AnnotateOptions(options.source, str(tmp_path / f"out-{nth}"), "default", chunk_rows=4)
        crash.left = nth
        assert attempt(again) is None, "it did not crash"
        crash.left = -1
        done = attempt(again)
        assert done is not None
        check(again, done)


def test_crash_in_every_attempt_run_finishes_in_the_end(crash: CrashAtWrite, options: AnnotateOptions) -> None:
    """Each attempt crashes a few writes later than the one before."""
    attempts, done = 0, None
    while done is None:
        crash.left = 3 + attempts // 12
        done, attempts = attempt(options), attempts + 1
        assert attempts < 500
    crash.left = -1
    check(options, done)
    assert attempts > 5


def test_workers_of_a_killed_run_still_alive_change_nothing(
    crash: CrashAtWrite, options: AnnotateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers of a killed run write their chunks while the next run publishes: the first chunks count."""
    late: list[tuple[RunState, str, bytes]] = []
    save_table, put = RunState.save_table, LocalFolder.put

    def save_twice(run: RunState, stage: Stage, name: str, parquet: bytes) -> None:
        save_table(run, stage, name, parquet)
        for table in from_parquet(parquet) if stage == "chunks" else ():
            scores = [None if score is None else 0.123 for score in table.column("score").to_pylist()]
            index = table.column_names.index("score")
            late.append((run, name, to_parquet(table.set_column(index, "score", [scores]))))

    def put_after_others(folder: LocalFolder, name: str, data: bytes) -> None:
        for run, chunk, parquet in late:
            save_table(run, "chunks", chunk, parquet)
        put(folder, name, data)

    monkeypatch.setattr(RunState, "save_table", save_twice)
    monkeypatch.setattr(LocalFolder, "put", put_after_others)
    done = attempt(options)
    assert done is not None
    check(options, done)
    assert 0.123 not in [row["score"] for row in pq.read_table(options.out).to_pylist()]


def test_complete_run_is_not_repeated(crash: CrashAtWrite, options: AnnotateOptions) -> None:
    first = attempt(options)
    writes = crash.writes
    assert attempt(options) == first
    assert crash.writes <= writes + 4, "a complete run writes next to nothing"

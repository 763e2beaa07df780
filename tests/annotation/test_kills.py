"""`sluice annotate` is killed repeatedly on a real Ray cluster: no row is repeated or missing."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import boto3
import psutil
import pyarrow.parquet as pq
import pytest

from services.core.processes import SupervisedProcess
from tests.support.annotation_service import assessment
from tests.support.command_line import SLUICE
from tests.support.data_set_images import picture, tar

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

_START_S = 150.0
_DISTINCT = 240
_SEED = int(os.environ.get("SLUICE_TEST_SEED", "0")) or random.randrange(1 << 30)


class Cluster:
    """A Ray cluster with a scripted guard, in its own process."""

    def __init__(self, folder: Path) -> None:
        address, self.log = folder / "address", folder / "assessments"
        self.child = SupervisedProcess(
            [sys.executable, "-m", "tests.support.annotation_service", str(address), str(self.log)],
            log=folder / "log",
            env={name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"},
        )
        deadline = time.monotonic() + _START_S
        while not address.exists():
            assert time.monotonic() < deadline, self.child.tail()
            time.sleep(0.1)
        self.address = address.read_text()

    def workers(self) -> list[psutil.Process]:
        """Ray's processes that index and judge."""
        found = []
        for process in psutil.Process(self.child.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if any("MapWorker" in part or "MapBatches" in part for part in process.cmdline()):
                    found.append(process)
        return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, s3_endpoint: str) -> Iterator[Cluster]:
    assert s3_endpoint  # the workers inherit its credentials
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    yield made
    made.child.kill()


class Command:
    """One run of `sluice annotate`."""

    def __init__(self, cluster: Cluster, folder: Path, *arguments: str, **environment: str) -> None:
        self.errors = folder / "stderr"
        settings = {"SLUICE_RAY_ADDRESS": cluster.address, "SLUICE_MODEL": "tiny", "RAY_AUTH_MODE": "token"}
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [SLUICE, "annotate", *arguments],
                cwd=folder,
                env={**os.environ, **settings, **environment},
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )

    def finish(self) -> dict[str, Any]:
        """Its summary."""
        output, _ = self.process.communicate(timeout=300)
        assert self.process.returncode == 0, self.errors.read_text()
        summary: dict[str, Any] = json.loads(output)
        return summary

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def check(rows: list[dict[str, Any]], count: int, bad: int) -> None:
    """Every row exists once, with the scripted answer for its bytes."""
    assert len(rows) == count, f"SLUICE_TEST_SEED={_SEED}"
    assert sorted(row["row"] for row in rows) == list(range(count))
    assert len({row["uri"] for row in rows}) == count
    assert len({row["verdict_id"] for row in rows if row["verdict_id"]}) == count - bad
    assert Counter(row["outcome"] for row in rows) == {"verdict": count - bad, "dead_letter": bad}
    judged = {row["row"]: row for row in rows}
    for row in rows:
        if row["outcome"] == "verdict":
            expected = assessment(row["sha256"])
            assert (row["rating"], row["category"], row["score"]) == (
                expected.rating,
                expected.category,
                expected.score,
            )
            assert judged[row["duplicate_of"] or row["row"]]["sha256"] == row["sha256"]
    assert sum(row["duplicate_of"] is None for row in rows if row["outcome"] == "verdict") == _DISTINCT


def shards(folder: Path) -> tuple[int, int]:
    """Write tars with every picture twice and some bad ones. Returns the number of rows, and of bad ones."""
    folder.mkdir()
    draw = random.Random(_SEED)
    images = [(f"{n:04d}-{copy}.png", picture(n)) for copy in (1, 2) for n in range(_DISTINCT)]
    images += [(f"bad-{n}.png", b"no image %d" % n) for n in range(20)]
    draw.shuffle(images)
    for number in range(8):
        tar(folder / f"{number}.tar", images[number::8])
    return len(images), 20


def test_killed_at_random_times_run_finishes(cluster: Cluster, tmp_path: Path) -> None:
    """SIGKILL for the command, for its workers, or for both, from the first second to the last."""
    count, bad = shards(tmp_path / "shards")
    arguments = ("shards", "--out", "out", "--chunk-rows", "10", "--workers", "2", "--json")
    draw, seen = random.Random(_SEED), Counter[str]()
    for stage in ("indexed", "judged"):
        command = Command(cluster, tmp_path, *arguments)
        _wait_for(command, tmp_path / "out", stage)
        time.sleep(draw.uniform(0, 1.5))
        victim = draw.choice(["command", "workers", "both"])
        for worker in cluster.workers() if victim != "command" else []:
            with suppress(psutil.NoSuchProcess):
                worker.kill()
                seen["workers"] += 1
        if victim == "workers":
            time.sleep(draw.uniform(0, 1))  # new workers continue until the command is killed
        seen["unfinished"] += command.process.poll() is None
        command.kill()
    summary = Command(cluster, tmp_path, *arguments).finish()
    assert seen["unfinished"] >= 1, f"the kills came too late; SLUICE_TEST_SEED={_SEED}"
    assert (summary["rows"], summary["duplicates"]) == (count, _DISTINCT)
    assert summary["errors"]["not_an_image"]["rows"] == bad
    check(pq.read_table(tmp_path / "out").to_pylist(), count, bad)
    assert Command(cluster, tmp_path, *arguments).finish() == summary, "a complete run does not change"


def test_killed_while_writing_to_s3_run_finishes(cluster: Cluster, tmp_path: Path, s3_endpoint: str) -> None:
    """From a bucket to a bucket, where conditional writes never overwrite a file."""
    s3: Any = boto3.client("s3", endpoint_url=s3_endpoint)
    bucket = f"annotated-{uuid.uuid4().hex}"
    s3.create_bucket(Bucket=bucket)
    for n in range(60):
        s3.put_object(Bucket=bucket, Key=f"in/{n:03d}.png", Body=picture(n // 2))
    arguments = (f"s3://{bucket}/in", "--out", f"s3://{bucket}/out", "--chunk-rows", "4", "--json")
    first = Command(cluster, tmp_path, *arguments, SLUICE_S3_ENDPOINT=s3_endpoint)
    deadline = time.monotonic() + _START_S
    while not s3.list_objects_v2(Bucket=bucket, Prefix="out/_sluice/chunks/").get("KeyCount"):
        assert time.monotonic() < deadline, first.errors.read_text()
        assert first.process.poll() is None, first.errors.read_text()
        time.sleep(0.05)
    first.kill()
    summary = Command(cluster, tmp_path, *arguments, SLUICE_S3_ENDPOINT=s3_endpoint).finish()
    assert (summary["rows"], summary["duplicates"], summary["outcome"]) == (60, 30, {"verdict": 60})
    keys = [each["Key"] for each in s3.list_objects_v2(Bucket=bucket, Prefix="out/")["Contents"]]
    assert {key for key in keys if "_sluice/" in key} == {
        f"out/_sluice/{name}.json" for name in ("run", "listing", "plan")
    }


def _wait_for(command: Command, out: Path, stage: str) -> None:
    """Until the stage is under way, or the command has ended."""
    found = {
        "indexed": lambda: any((out / "_sluice" / "index").glob("*.parquet")),
        "judged": lambda: len(list((out / "_sluice" / "chunks").glob("*.parquet"))) > 3,
    }[stage]
    deadline = time.monotonic() + _START_S
    while command.process.poll() is None and not found():
        assert time.monotonic() < deadline, command.errors.read_text()
        time.sleep(0.05)

"""Rows a second of `sluice annotate` with a scripted guard, compared with a plain loop of the same steps.

    python benchmarks/annotate.py [IMAGES] [MS]

IMAGES drawn images (default 3000) are judged on a Ray cluster of this machine, by a guard that takes MS milliseconds
(default 0) for each. Both sides read the same files, prepare them with two decoders, have 64 images in flight and write
parquet. The loop is one process without Ray. It indexes nothing, finds no duplicates, and starts again from nothing
after a kill. The command is timed by its own progress lines, from the first judged chunk to the last, and as a whole.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.tiny_guard.drawings import draw
from services.core.messages import Verdict
from services.core.processes import SupervisedProcess
from services.core.settings import Settings
from services.core.values import StoredObject
from services.images.decoder_pool import DecoderPool
from services.moderation.cascade import judge_image
from services.moderation.retrying_ports import RetryingPreparer
from services.moderation.step_timer import StepTimer
from services.moderation.verdicts import VerdictSubject, build_verdicts
from services.policies.document import BUILT_IN
from tests.support.annotation_service import assessment
from tests.support.fake_guard import FakeGuard

IN_FLIGHT = 64


def main() -> None:
    images = int(sys.argv[1]) if len(sys.argv) > 1 else 3000
    pause_ms = float(sys.argv[2]) if len(sys.argv) > 2 else 0.0
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        (folder / "images").mkdir()
        for number in range(images):
            (folder / "images" / f"{number:06d}.jpg").write_bytes(draw(number).jpeg)
        loop_s = asyncio.run(time_plain_loop(folder, pause_ms / 1000))
        rows_per_s, whole_s = time_command(folder, pause_ms)
        print(f"plain loop     {images / loop_s:8.1f} rows/s")
        print(
            f"annotate       {rows_per_s:8.1f} rows/s while it judges, {rows_per_s * loop_s / images:.2f} of the loop"
        )
        print(f"as a whole     {images / whole_s:8.1f} rows/s ({whole_s:.0f} s, with the start of Ray and Python)")


async def time_plain_loop(folder: Path, pause_s: float) -> float:
    """Run the plain loop; return its duration in seconds."""

    async def script(image, _detail):  # type: ignore[no-untyped-def]
        await asyncio.sleep(pause_s)
        return assessment(image.sha256)

    settings, policy = Settings(model="tiny"), BUILT_IN.as_version(1)
    preparer = DecoderPool(settings, 384)
    slots = asyncio.Semaphore(IN_FLIGHT)

    async def judge(file: Path) -> Verdict:
        async with slots:
            stored = StoredObject(await asyncio.to_thread(file.read_bytes), None, None)
            timer, guard = StepTimer.start(), FakeGuard(script)
            judged = await judge_image(
                stored.data,
                [policy],
                priority="backfill",
                guard=guard,
                preparer=RetryingPreparer(preparer),
                timer=timer,
            )
            subject = VerdictSubject(file.name, file.as_uri(), "default")
            (verdict,) = build_verdicts(subject, stored, [policy], judged, timer)
            assert isinstance(verdict, Verdict)
            return verdict

    started = time.monotonic()
    verdicts = await asyncio.gather(*map(judge, sorted((folder / "images").iterdir())))
    rows = [json.loads(verdict.model_dump_json(exclude={"metadata"})) for verdict in verdicts]
    pq.write_table(pa.Table.from_pylist(rows), folder / "plain.parquet")
    seconds = time.monotonic() - started
    preparer.close()
    return seconds


def time_command(folder: Path, pause_ms: float) -> tuple[float, float]:
    """Run `sluice annotate`; return rows a second while it judges, and the duration of the whole command in seconds."""
    address = folder / "address"
    cluster = SupervisedProcess(
        [sys.executable, "-m", "tests.support.annotation_service", str(address), str(folder / "log"), str(pause_ms)],
        log=folder / "cluster.log",
    )
    try:
        while not address.exists():
            time.sleep(0.1)
        environment = {
            "RAY_AUTH_MODE": "token",
            "SLUICE_RAY_ADDRESS": address.read_text(),
            "SLUICE_MODEL": "tiny",
            "SLUICE_IN_FLIGHT": str(IN_FLIGHT),
        }
        started = time.monotonic()
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("sluice")), "annotate", "images", "--out", "out"],
            cwd=folder,
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        judged: list[tuple[float, int]] = []
        assert process.stderr
        for line in process.stderr:
            print(f"  {line.rstrip()}", file=sys.stderr)
            if match := re.match(r"judged ([\d,]+)", line):
                judged.append((time.monotonic(), int(match[1].replace(",", ""))))
        assert process.wait() == 0
        (first_s, first_count), (last_s, last_count) = judged[0], judged[-1]
        if first_count == last_count:
            raise SystemExit(f"{last_count} images are too few: the command reported progress only once; give more")
        return (last_count - first_count) / (last_s - first_s), time.monotonic() - started
    finally:
        cluster.kill()


if __name__ == "__main__":
    main()

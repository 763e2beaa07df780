"""Kills and stops processes of the engine, over and over, while images are being judged.

    python benchmarks/guard_faults.py [--faults 100] [--seed 1] [--json]

Each fault is SIGKILL or SIGSTOP for one process of the engine, whichever, at a random moment, every fourth one while
the engine is starting. Every call has to end, within its deadline, in an answer or in an error that says that trying
again can help; at the end no process may be left.
"""

import argparse
import asyncio
import json
import logging
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil

from pipelines.tiny_guard.drawings import draw
from services.core.errors import GuardUnavailable
from services.guard import engine as engine_module
from services.guard.checkpoints import resolve
from services.guard.engine import Engine
from services.guard.inference import GuardInference
from services.images.decode import Limits, prepare
from services.policies.document import BUILT_IN

CALLERS = 6
DEADLINE_S = 15.0
GRACE_S = 3.0
"""What a loaded machine may take to deliver an answer that is there."""


async def call_for_ever(guard: GuardInference, number: int, ends: Counter[str]) -> None:
    policy = BUILT_IN.as_version(1)
    image = prepare(draw(number).jpeg, Limits(image_px=1_000_000, side_px=guard.max_side_px))
    while True:
        started = time.monotonic()
        try:
            await guard.assess(image, policy, "verdict")
            ends["answers"] += 1
        except GuardUnavailable:
            ends["retryable"] += 1
        except Exception as error:  # noqa: BLE001 - any other error is a finding
            ends[f"wrong: {type(error).__name__}: {error}"] += 1
        if time.monotonic() - started > DEADLINE_S + GRACE_S:
            ends["late"] += 1
        await asyncio.sleep(0.2)


def processes(engine: Engine) -> list[psutil.Process]:
    """The engine's own processes, without the guardian that cleans up after them."""
    with suppress(psutil.NoSuchProcess):
        if engine.pid is not None:
            return psutil.Process(engine.pid).children(recursive=True)
    return []


async def until(condition: str, engine: Engine, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while engine.state != condition:
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.1)
    return True


async def run(faults: int, seed: int) -> dict[str, int]:
    rng = random.Random(seed)
    ends: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="sluice-faults-") as folder:
        engine = Engine(
            resolve("tiny"), state_dir=Path(folder), deadline_s=DEADLINE_S, start_s=240, probe_every_s=2, hang_s=10
        )
        engine_module._LONGEST_PAUSE_S = 1.0  # the pauses are for machines that are broken, here they only take time
        async with engine:
            guard = GuardInference(engine, deadline_s=DEADLINE_S)
            callers = [asyncio.create_task(call_for_ever(guard, number, ends)) for number in range(CALLERS)]
            known: set[psutil.Process] = set()
            recovered = 0
            for number in range(faults):
                if number % 4 == 3:
                    await until("restarting", engine, 30)
                    await asyncio.sleep(rng.uniform(1, 20))
                else:
                    recovered += await until("ready", engine, 300)
                    await asyncio.sleep(rng.uniform(0, 3))
                family = processes(engine)
                known.update(family)
                if family:
                    victim, how = rng.choice(family), rng.choice([signal.SIGKILL, signal.SIGSTOP])
                    with suppress(psutil.NoSuchProcess):
                        name = victim.name()
                        victim.send_signal(how)
                        print(f"{number + 1:3} {how.name} {name:<20} {dict(ends)}", file=sys.stderr, flush=True)
            back = await until("ready", engine, 300)
            for caller in callers:
                caller.cancel()
            await asyncio.gather(*callers, return_exceptions=True)
            known.update(processes(engine))
        await asyncio.sleep(1)
        left = [process for process in known if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    wrong = sum(count for end, count in ends.items() if end.startswith("wrong"))
    return {
        "faults": faults,
        "answers": ends["answers"],
        "retryable": ends["retryable"],
        "wrong": wrong,
        "late": ends["late"],
        "recovered": recovered,
        "ready_at_the_end": int(back),
        "processes_left": len(left),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="end with one JSON line on stdout")
    given = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    found = asyncio.run(run(given.faults, given.seed))
    print(json.dumps(found) if given.json else "\n".join(f"{name:<20} {value}" for name, value in found.items()))
    sys.exit(bool(found["wrong"] or found["late"] or found["processes_left"] or not found["ready_at_the_end"]))

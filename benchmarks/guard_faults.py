"""Kill and stop processes of the engine repeatedly while images are judged.

    python benchmarks/guard_faults.py [--faults 100] [--seed 1] [--json]

Each fault is SIGKILL or SIGSTOP for a random process of the engine at a random moment. Every fourth fault comes while
the engine starts. Every call must end within its deadline, with an answer or with an error that allows a retry. At the
end no process may be left.
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
from services.guard.checkpoints import resolve_checkpoint
from services.guard.engine import Engine
from services.guard.inference import GuardInference
from services.images.decode import Limits, prepare
from services.policies.document import BUILT_IN

CALLERS = 6
DEADLINE_S = 15.0
GRACE_S = 3.0
"""Time that a loaded machine may take to deliver a finished answer."""


async def call_repeatedly(guard: GuardInference, number: int, results: Counter[str]) -> None:
    policy = BUILT_IN.as_version(1)
    image = prepare(draw(number).jpeg, Limits(image_px=1_000_000, side_px=guard.max_side_px))
    while True:
        started = time.monotonic()
        try:
            await guard.assess_each(image, [policy], "verdict")
            results["answers"] += 1
        except GuardUnavailable:
            results["retryable"] += 1
        except Exception as error:  # noqa: BLE001 - any other error is a finding
            results[f"wrong: {type(error).__name__}: {error}"] += 1
        if time.monotonic() - started > DEADLINE_S + GRACE_S:
            results["late"] += 1
        await asyncio.sleep(0.2)


def processes(engine: Engine) -> list[psutil.Process]:
    """The processes of the engine, without the watchdog that cleans up after them."""
    with suppress(psutil.NoSuchProcess):
        if engine.pid is not None:
            return psutil.Process(engine.pid).children(recursive=True)
    return []


async def wait_for_state(state: str, engine: Engine, within_s: float) -> bool:
    """Wait until the engine has the state; False if it does not within `within_s` seconds."""
    deadline = time.monotonic() + within_s
    while engine.state != state:
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.1)
    return True


async def run(faults: int, seed: int) -> dict[str, int]:
    rng = random.Random(seed)
    results: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="sluice-faults-") as folder:
        engine = Engine(
            resolve_checkpoint("tiny"),
            state_dir=Path(folder),
            deadline_s=DEADLINE_S,
            start_s=240,
            probe_every_s=2,
            hang_s=10,
        )
        engine_module._PAUSE_LIMIT_S = 1.0  # the pauses are for broken machines; here they would only take time
        async with engine:
            guard = GuardInference(engine, deadline_s=DEADLINE_S)
            callers = [asyncio.create_task(call_repeatedly(guard, number, results)) for number in range(CALLERS)]
            known: set[psutil.Process] = set()
            recovered = 0
            for number in range(faults):
                if number % 4 == 3:
                    await wait_for_state("restarting", engine, 30)
                    await asyncio.sleep(rng.uniform(1, 20))
                else:
                    recovered += await wait_for_state("ready", engine, 300)
                    await asyncio.sleep(rng.uniform(0, 3))
                running = processes(engine)
                known.update(running)
                if running:
                    victim, fault = rng.choice(running), rng.choice([signal.SIGKILL, signal.SIGSTOP])
                    with suppress(psutil.NoSuchProcess):
                        name = victim.name()
                        victim.send_signal(fault)
                        print(f"{number + 1:3} {fault.name} {name:<20} {dict(results)}", file=sys.stderr, flush=True)
            is_ready = await wait_for_state("ready", engine, 300)
            for caller in callers:
                caller.cancel()
            await asyncio.gather(*callers, return_exceptions=True)
            known.update(processes(engine))
        await asyncio.sleep(1)
        left = [process for process in known if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    wrong = sum(count for result, count in results.items() if result.startswith("wrong"))
    return {
        "faults": faults,
        "answers": results["answers"],
        "retryable": results["retryable"],
        "wrong": wrong,
        "late": results["late"],
        "recovered": recovered,
        "ready_at_the_end": int(is_ready),
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

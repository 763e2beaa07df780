"""The time to choose a policy, and the time until a change of the active version reaches every process.

    python benchmarks/policies.py [--changes 200] [--processes 8] [--json]

The baseline of a choice is a request to Redis each time. For the changes, each process chooses a policy for 500
submissions a second, while the active version changes repeatedly. The backends are the embedded Valkey and S3 server.
"""

import argparse
import asyncio
import json
import os
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipelines.local import backends
from services.core import settings as settings_module
from services.core.messages import Submission
from services.core.settings import Settings
from services.policies.cache import PolicyCache
from services.policies.document import BUILT_IN
from services.policies.redis_cache import PolicyRedisCache
from services.policies.registry import PolicyRegistry

CHOICES = 200_000
REDIS_REQUESTS = 2_000
CHANGE_INTERVAL_S = 0.3
CHOICE_INTERVAL_S = 0.002


def open_stores(settings: Settings) -> tuple[PolicyRegistry, PolicyRedisCache]:
    return PolicyRegistry.from_settings(settings), PolicyRedisCache.from_settings(settings)


async def measure_choices(settings: Settings) -> dict[str, float]:
    """Microseconds of one choice, in memory and through Redis."""
    registry, shared = open_stores(settings)
    submissions = [Submission(id=f"upl-{n}", uri="s3://uploads/a") for n in range(1000)]
    async with PolicyCache(registry, shared) as cache:
        await cache.choose(submissions[0])
        started = time.perf_counter()
        for n in range(CHOICES):
            await cache.choose(submissions[n % 1000])
        local_us = (time.perf_counter() - started) / CHOICES * 1e6
    started = time.perf_counter()
    for _ in range(REDIS_REQUESTS):
        await shared.find_newest_change("default")
    redis_us = (time.perf_counter() - started) / REDIS_REQUESTS * 1e6
    await shared.close()
    return {"look_up_us": local_us, "redis_us": redis_us, "ratio": redis_us / local_us}


async def observe(seconds: float) -> None:
    """A process that chooses policies. It prints a line when the chosen version changes, and one at the end."""
    registry, shared = open_stores(settings_module.load())
    last, chosen, longest_s = 0, 0, 0.0
    async with PolicyCache(registry, shared) as cache:
        await cache.choose(Submission(id="first", uri="s3://uploads/a"))
        print(json.dumps({"ready": True}), flush=True)
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end:
            version = (await cache.choose(Submission(id=f"upl-{chosen}", uri="s3://uploads/a"))).policy.identity.version
            chosen += 1
            longest_s = max(longest_s, time.monotonic() - now)
            if version != last:
                print(json.dumps({"version": version, "at": time.monotonic()}), flush=True)
                last = version
            await asyncio.sleep(CHOICE_INTERVAL_S)
    print(json.dumps({"chosen": chosen, "longest_s": longest_s}), flush=True)
    await shared.close()


async def measure_changes(settings: Settings, count: int, processes: int) -> dict[str, float]:
    """Activate versions one after the other; measure the seconds until each process chooses each of them."""
    registry, shared = open_stores(settings)
    for number in range(count):
        registry.publish(BUILT_IN.model_copy(update={"description": f"number {number}"}))
    command = [sys.executable, __file__, "--observe", str(count * (CHANGE_INTERVAL_S + 0.25) + 10)]
    children = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220 - nothing else runs here yet
        for _ in range(processes)
    ]
    for child in children:
        assert child.stdout is not None
        await asyncio.to_thread(child.stdout.readline)
    activated_at: dict[int, float] = {}
    for number in range(count):
        change = await asyncio.to_thread(registry.activate, "default", number + 2, who="benchmark")
        activated_at[number + 2] = time.monotonic()
        await shared.publish_change("default", change)
        await asyncio.sleep(CHANGE_INTERVAL_S)
    outputs = await asyncio.gather(*(asyncio.to_thread(child.communicate) for child in children))
    lines = [[json.loads(line) for line in output.splitlines()] for output, _ in outputs]
    seen = [{line["version"]: line["at"] for line in process if "version" in line} for process in lines]
    delays = sorted(max(0.0, process[v] - at) for process in seen for v, at in activated_at.items() if v in process)
    await shared.close()
    return {
        "changes": count,
        "processes": processes,
        "missed": sum(v not in process for process in seen for v in activated_at),
        "failed": sum(child.returncode != 0 for child in children),
        "chosen": sum(process[-1]["chosen"] for process in lines),
        "longest_choice_ms": max(process[-1]["longest_s"] for process in lines) * 1000,
        "propagation_p50_ms": statistics.median(delays) * 1000,
        "propagation_p99_ms": delays[int(0.99 * len(delays))] * 1000,
        "propagation_max_ms": delays[-1] * 1000,
    }


@contextmanager
def start_backends() -> Iterator[Settings]:
    with backends.start_backends(os.environ) as variables:
        os.environ.update(variables)
        os.environ.setdefault("SLUICE_REDIS_SIGNING_KEY", secrets.token_hex(32))  # as `sluice up --embedded` does
        settings = settings_module.load()
        PolicyRegistry.from_settings(settings).publish_built_in()
        yield settings


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    with start_backends() as settings:
        return asyncio.run(measure_choices(settings)) | asyncio.run(
            measure_changes(settings, arguments.changes, arguments.processes)
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", type=int, default=200)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="end with one JSON line on stdout")
    parser.add_argument("--observe", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.observe:
        asyncio.run(observe(given.observe))
    else:
        found = {name: round(value, 3) for name, value in main(given).items()}
        print(json.dumps(found) if given.json else "\n".join(f"{name:<20} {value}" for name, value in found.items()))

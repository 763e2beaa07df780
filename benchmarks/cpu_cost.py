"""The CPU time that a change of the code costs: per request of the gateway, and per message of the stream.

    git worktree add ../before v0.1.0
    python benchmarks/cpu_cost.py ../before [--part gateway] [--rounds 20]

Runs the gateway or the intake of two source trees, this one and the one before, at the same time. Both get the same
work in turn, in small batches, so both see the same load of the machine. The guard takes no time. Compares the CPU time
of the process and of its decoders, not the time that passes, because other work on the machine changes that.

Prints one JSON object for each kind of work: the milliseconds of CPU time of both trees, and the median of the ratios
of the rounds with its 95 % confidence interval.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import boto3
import httpx
import psutil
import redis
from ray._private.async_compat import try_install_uvloop

import benchmarks.gateway
from pipelines.local import backends
from services.core.settings import Settings
from services.streams.base import OutgoingMessage
from services.streams.config import StreamConfig
from services.streams.factory import open_publisher
from tests.support.fake_guard import FakeGuard
from tests.support.intake_bench import IntakeBench

_HERE: Final = Path(__file__).resolve()
_REQUESTS: Final = 24
"""Requests of one kind in a batch."""
_CONCURRENT: Final = 2
_MESSAGES: Final = 300
"""Messages in a batch."""
_IMAGES: Final = 60


@dataclass(slots=True)
class Child:
    """A gateway or an intake member of one source tree, as a process."""

    process: asyncio.subprocess.Process
    about: dict[str, str]
    """What it printed when it was ready."""
    environment: dict[str, str]

    def cpu_s(self) -> float:
        """CPU time until now, of the process and of its decoders."""
        main = psutil.Process(self.process.pid)
        family = [each for each in main.children(recursive=True) if "decoder_process" in " ".join(each.cmdline())]
        # Linux has a clock of the CPU time for each process: clock_getcpuclockid(3).
        return sum(time.clock_gettime((~each.pid << 3) | 2) for each in (main, *family))


async def start(tree: Path, part: str, closing: AsyncExitStack, **environment: str) -> Child:
    """Start the gateway or the intake of a source tree."""
    variables = {**os.environ, **environment, "PYTHONPATH": str(tree)}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(_HERE), "--child", part), cwd=tree, env=variables, stdin=PIPE, stdout=PIPE
    )

    async def stop() -> None:
        if process.stdin is not None:
            process.stdin.close()
        await process.wait()

    closing.push_async_callback(stop)
    assert process.stdout is not None
    return Child(process, json.loads(await process.stdout.readline()), environment)


async def run_gateway() -> None:
    """Run the gateway of this source tree until stdin ends."""
    benchmarks.gateway.GUARD_S = 0.0
    async with benchmarks.gateway.gateway("tiny", gateway_rate_per_s=100_000) as running:
        _, key = running.keys.create("benchmark", "moderate")
        print(json.dumps({"url": running.url, "key": key}), flush=True)
        await asyncio.to_thread(sys.stdin.read)


async def run_member() -> None:
    """Run an intake member of this source tree until stdin ends."""
    settings = Settings()
    bench = IntakeBench(settings, FakeGuard())
    bench.s3.create_bucket(Bucket=settings.policy_bucket)
    bench.registry.publish_built_in()
    await bench.start()
    print(json.dumps({"verdicts": settings.verdicts_stream}), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await bench.close()


Batch = Callable[[], Awaitable[None]]


async def compare(name: str, rounds: int, work: list[tuple[Child, Batch]], count: int) -> None:
    """Give both trees the same batches in turn. Prints one JSON object."""
    took: list[list[float]] = [[], []]
    for number in range(rounds + 2):
        order = [0, 1] if number % 2 else [1, 0]
        for each in order:
            child, batch = work[each]
            began = child.cpu_s()
            await batch()
            if number >= 2:  # warm
                took[each].append((child.cpu_s() - began) * 1000 / count)
    ratios = [after / before for before, after in zip(*took, strict=True)]
    draws = sorted(statistics.median(random.choices(ratios, k=len(ratios))) for _ in range(2000))
    figures = {
        "work": name,
        "before_ms": round(statistics.median(took[0]), 3),
        "after_ms": round(statistics.median(took[1]), 3),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_95": [round(draws[49], 3), round(draws[-50], 3)],
        "rounds": rounds,
        "load": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(figures), flush=True)


async def compare_gateways(trees: list[Path], rounds: int) -> None:
    async with AsyncExitStack() as closing:
        children = [await start(tree, "gateway", closing) for tree in trees]
        clients = [
            await closing.enter_async_context(
                httpx.AsyncClient(
                    base_url=each.about["url"], headers={"Authorization": f"Bearer {each.about['key']}"}, timeout=60
                )
            )
            for each in children
        ]
        sent = 0

        async def send(client: httpx.AsyncClient, path: str, arguments: dict[str, Any]) -> None:
            nonlocal sent

            async def send_some() -> None:
                nonlocal sent
                for _ in range(_REQUESTS // _CONCURRENT):
                    sent += 1
                    headers = {name: value.format(n=sent) for name, value in arguments.get("headers", {}).items()}
                    (await client.post(path, **{**arguments, "headers": headers})).raise_for_status()

            await asyncio.gather(*(send_some() for _ in range(_CONCURRENT)))

        for name, path, arguments in benchmarks.gateway.requests("s3://uploads/a.jpg"):
            batches = [partial(send, client, path, arguments) for client in clients]
            await compare(name, rounds, list(zip(children, batches, strict=True)), _REQUESTS)


async def compare_members(trees: list[Path], rounds: int) -> None:
    async with AsyncExitStack() as closing:
        environment = closing.enter_context(backends.start_backends({"SLUICE_MODEL": "tiny"}))
        os.environ.update(environment)
        s3 = boto3.client("s3", endpoint_url=environment["SLUICE_S3_ENDPOINT"])
        for number in range(_IMAGES):
            s3.put_object(Bucket="uploads", Key=f"{number}.jpg", Body=benchmarks.gateway.picture(224 + number, "JPEG"))
        children = [
            await start(
                tree,
                "member",
                closing,
                SLUICE_GROUP=name,
                SLUICE_POLICY_BUCKET=f"policies-of-{name}",
                SLUICE_SUBMISSIONS_STREAM=f"{name}.submissions",
                SLUICE_VERDICTS_STREAM=f"{name}.verdicts",
                SLUICE_DEAD_LETTERS_STREAM=f"{name}.dead-letters",
            )
            for name, tree in zip(("before", "after"), trees, strict=True)
        ]
        publisher = await open_publisher(StreamConfig.from_settings(Settings()))
        closing.push_async_callback(publisher.close)
        streams = redis.Redis.from_url(environment["SLUICE_REDIS_URL"])
        sent = 0

        async def submit(child: Child) -> None:
            nonlocal sent
            messages = []
            for number in range(_MESSAGES):
                sent += 1
                document = {"id": f"m-{sent}", "uri": f"s3://uploads/{number % _IMAGES}.jpg"}
                stream = child.environment["SLUICE_SUBMISSIONS_STREAM"]
                messages.append(OutgoingMessage(stream, json.dumps(document).encode(), f"k-{sent}".encode(), ()))
            done = streams.xlen(child.about["verdicts"]) + len(messages)
            await publisher.publish(messages)
            while streams.xlen(child.about["verdicts"]) < done:  # noqa: ASYNC110 - the stream has no event for this
                await asyncio.sleep(0.02)

        await compare(
            "message of the stream, JPEG 224 to 283 px",
            rounds,
            [(each, partial(submit, each)) for each in children],
            _MESSAGES,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path, nargs="?", help="folder of the source tree before the change")
    parser.add_argument("--part", choices=["gateway", "stream"], action="append", help="default: both")
    parser.add_argument("--rounds", type=int, default=20, help="batches of each kind and tree")
    parser.add_argument("--child", choices=["gateway", "member"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    try_install_uvloop()  # the loop that Ray gives its workers
    if given.child:
        asyncio.run({"gateway": run_gateway, "member": run_member}[given.child]())
        return
    if given.before is None:
        parser.error("name the folder of the source tree before the change")
    trees = [given.before.resolve(), _HERE.parents[1]]
    parts = {"gateway": compare_gateways, "stream": compare_members}
    for part in given.part or list(parts):
        asyncio.run(parts[part](trees, given.rounds))


if __name__ == "__main__":
    main()

"""10,000 slow uploads at a time, and what they do to a neighbour who asks for assessments meanwhile.

    python -m benchmarks.gateway_slow [--connections 10000] [--seconds 60]

The whole gateway as in `benchmarks/gateway.py`, with default settings, in this process; the slow clients are a second
process, the neighbour is a third with an API key of its own. Of ten slow clients six send a body by single bytes with
one valid API key, two with an unknown one, one half-closes its connection in the middle of the body, and one never
ends the head of its request. Whoever is refused comes again after some seconds. Prints one JSON object.
"""

import argparse
import asyncio
import json
import os
import random
import re
import resource
import statistics
import sys
import time
from asyncio.subprocess import PIPE
from collections import Counter
from contextlib import AsyncExitStack, suppress
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import psutil
from ray._private.async_compat import try_install_uvloop

from benchmarks.gateway import Running, gateway, picture

DRIP_S: Final = 2.0
"""From one byte of a connection to the next."""
OPENED_PER_S: Final = 500
AGAIN_S: Final = (20.0, 40.0)
SOURCES: Final = 4
"""Addresses of this machine that the slow clients come from: one has 28,000 ports, and each stays taken for a while."""
QUIET_S: Final = 15
_HEAD: Final = "POST /v1/assessments?wait=5 HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/json\r\n"
_BODY: Final = "Content-Length: 1000000\r\n\r\n{"
_PROBLEM: Final = re.compile(rb"urn:sluice:problem:([a-z-]+)")


class Slow(asyncio.Protocol):
    """One slow client's connection."""

    def __init__(self, siege: "Siege", kind: str, start: bytes) -> None:
        self._siege = siege
        self._kind = kind
        self._start = start
        self._answer = b""
        self.closed = asyncio.Event()
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._siege.open[self] = None
        transport.write(self._start)
        if self._kind == "half-closed":
            transport.write_eof()

    def data_received(self, data: bytes) -> None:
        self._answer = (self._answer + data)[:4096]

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, _: Exception | None) -> None:
        self.closed.set()
        if self._siege.open.pop(self, self) is None:
            self._siege.refuse(self._kind, self._answer)

    def drip(self) -> None:
        if self._kind != "half-closed" and not self._transport.is_closing():
            self._transport.write(b"x")


class Siege:
    """All slow clients."""

    def __init__(self, url: str, keys: list[str], connections: int) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname or "", parts.port or 0)
        self._connections = connections
        unknown = f"sk-sluice-{'0' * 16}-{'A' * 43}"
        valid = [f"{_HEAD}Authorization: Bearer {key}\r\n{_BODY}".encode() for key in keys]
        self._starts = {
            "valid key": valid,
            "unknown key": [f"{_HEAD}Authorization: Bearer {unknown}\r\n{_BODY}".encode()],
            "half-closed": valid,
            "endless head": [f"{_HEAD}X-Slow: ".encode()],
        }
        self._kinds = ["valid key"] * 6 + ["unknown key"] * 2 + ["half-closed", "endless head"]
        self.open: dict[Slow, None] = {}
        self._most = 0
        self._attempts: Counter[str] = Counter()
        self._ends: dict[str, Counter[str]] = {kind: Counter() for kind in self._starts}

    def refuse(self, kind: str, answer: bytes) -> None:
        """Count how a connection ended."""
        problem = _PROBLEM.search(answer)
        said = f"{answer[9:12].decode()} {problem[1].decode() if problem else ''}".strip()
        self._ends[kind][said or "closed without an answer"] += 1

    async def run(self, seconds: float) -> dict[str, Any]:
        """Hold on for so long."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        clients = [asyncio.create_task(self._client(number)) for number in range(self._connections)]
        while loop.time() < until:
            began = loop.time()
            for number, slow in enumerate(list(self.open)):
                slow.drip()
                if number % 200 == 199:  # spread over the whole time
                    await asyncio.sleep(DRIP_S * 200 / max(len(self.open), 200))
            await asyncio.sleep(max(0.0, began + DRIP_S - loop.time()))
        for client in clients:
            client.cancel()
        held, ends = self._most, {kind: dict(count.most_common()) for kind, count in self._ends.items()}
        return {
            "attempts": sum(self._attempts.values()),
            "open_at_most": held,
            "by_kind": dict(self._attempts),
            "ends": ends,
        }

    async def _client(self, number: int) -> None:
        await asyncio.sleep(number / OPENED_PER_S)
        loop = asyncio.get_running_loop()
        kind, source = self._kinds[number % len(self._kinds)], f"127.0.0.{2 + number % SOURCES}"
        while True:
            slow = Slow(self, kind, random.choice(self._starts[kind]))
            self._attempts[kind] += 1
            try:
                await loop.create_connection(lambda slow=slow: slow, *self._address, local_addr=(source, 0))
                self._most = max(self._most, len(self.open))
                await slow.closed.wait()
            except OSError as error:
                self._ends[kind][f"not connected: {error.strerror}"] += 1
            await asyncio.sleep(random.uniform(*AGAIN_S))


async def neighbour(url: str, key: str, seconds: float) -> dict[str, Any]:
    """Somebody else, who asks for one assessment after the other: on a kept connection, and on a new one each."""
    image = picture(224, "JPEG")
    took: dict[str, list[float]] = {"kept": [], "new": []}
    errors: Counter[str] = Counter()
    until = time.monotonic() + seconds
    async with AsyncExitStack() as closing:
        clients = {}
        for name, kept in (("kept", 1), ("new", 0)):
            limits, headers = httpx.Limits(max_keepalive_connections=kept), {"Authorization": f"Bearer {key}"}
            client = httpx.AsyncClient(base_url=url, headers=headers, timeout=60, limits=limits)
            clients[name] = await closing.enter_async_context(client)
        while time.monotonic() < until:
            for name, client in clients.items():
                began = time.perf_counter()
                try:
                    answer = await client.post("/v1/assessments?wait=30", files={"file": ("a", image)})
                    if answer.status_code != 200:
                        errors[f"{name}: {answer.status_code} {answer.text[:100]}"] += 1
                except httpx.HTTPError as error:
                    errors[f"{name}: {type(error).__name__}"] += 1
                took[name].append((time.perf_counter() - began) * 1000)
    return {"ms": took, "errors": dict(errors)}


def summary(milliseconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(milliseconds, n=20)
    return {
        "requests": len(milliseconds),
        "p50_ms": round(statistics.median(milliseconds), 1),
        "p95_ms": round(cuts[-1], 1),
        "max_ms": round(max(milliseconds), 1),
    }


async def child(*arguments: str, told: str = "") -> Any:
    """What this program prints when it is run with these arguments."""
    command = (sys.executable, "-m", "benchmarks.gateway_slow", *arguments)
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
    output, _ = await process.communicate(told.encode())
    if process.returncode:
        raise RuntimeError(f"{arguments[0]} failed")
    return json.loads(output)


class Watch:
    """This process: the gateway."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.most_mib = self.mib()
        self._files = self.files()
        self.most_files = 0

    def mib(self) -> float:
        return round(self._process.memory_info().rss / (1 << 20), 1)

    def files(self) -> int:
        return len(os.listdir("/proc/self/fd"))

    async def look(self) -> None:
        while True:
            self.most_mib = max(self.most_mib, self.mib())
            self.most_files = max(self.most_files, self.files() - self._files)
            await asyncio.sleep(0.25)


async def measure(running: Running, connections: int, keys: int, seconds: float) -> dict[str, Any]:
    """Before, with and after the siege."""
    theirs = [running.keys.create(f"slow client {number}", "moderate")[1] for number in range(keys)]
    _, other = running.keys.create("neighbour", "moderate", tenant="neighbour")
    asking = ("--neighbour", running.url, other)
    await child(*asking, "--seconds", "5")  # warms up
    watch = Watch()
    before_mib = watch.mib()
    without = await child(*asking, "--seconds", str(QUIET_S))
    looking = asyncio.create_task(watch.look())
    besieging = asyncio.create_task(
        child(
            *("--besiege", running.url, "--connections", str(connections), "--seconds", str(seconds)),
            told="\n".join(theirs),
        )
    )
    besieged = await child(*asking, "--seconds", str(seconds))
    siege = await besieging
    await asyncio.sleep(3)
    looking.cancel()
    after = await child(*asking, "--seconds", "5")
    figures: dict[str, Any] = {"load": os.getloadavg(), "connections_held_at_most": watch.most_files}
    for name in ("kept", "new"):
        quiet, loaded = summary(without["ms"][name]), summary(besieged["ms"][name])
        ratios = {f"{p}_ratio": round(loaded[f"{p}_ms"] / quiet[f"{p}_ms"], 2) for p in ("p50", "p95")}
        figures[f"neighbour_{name}_connection"] = {"without": quiet, "with": loaded, **ratios}
    figures["neighbour_errors"] = without["errors"] | besieged["errors"] | after["errors"]
    figures["gateway_mib"] = {"before": before_mib, "at_most": watch.most_mib, "after": watch.mib()}
    return figures | {"siege": siege}


async def serve(connections: int, keys: int, seconds: float) -> None:
    async with gateway("tiny") as running:
        print(json.dumps(await measure(running, connections, keys, seconds), indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--keys", type=int, default=1, help="valid API keys that the slow clients have")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--besiege", metavar="URL", help=argparse.SUPPRESS)
    parser.add_argument("--neighbour", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    try_install_uvloop()  # the loop that Ray gives its workers
    if given.besiege:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        siege = Siege(given.besiege, sys.stdin.read().split(), given.connections)
        print(json.dumps(asyncio.run(siege.run(given.seconds))))
    elif given.neighbour:
        print(json.dumps(asyncio.run(neighbour(*given.neighbour, given.seconds))))
    else:
        with suppress(KeyboardInterrupt):
            asyncio.run(serve(given.connections, given.keys, given.seconds))


if __name__ == "__main__":
    main()

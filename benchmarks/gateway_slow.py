"""10,000 slow uploads at a time, and their effect on a neighbour that requests assessments meanwhile.

    python -m benchmarks.gateway_slow [--connections 10000] [--seconds 60] [--attack images]

The whole gateway of `benchmarks/gateway.py` runs in this process with default settings. The slow clients are a second
process, and the neighbour is a third with its own API key. Of ten slow clients,

- six send a body byte by byte with a valid API key;
- two do so with an unknown key;
- one half-closes its connection inside the body;
- one never ends the head of its request.

`--attack` chooses other clients:

- `pipelined` clients without a key send 200 requests each and read nothing;
- `unknown-keys` ask with made-up API keys, one request after the other;
- `flood` asks with made-up API keys, without a pause, on 64 connections of each of 2 processes;
- `reconnect` does the same on a new connection for each request;
- `images` send 16 images in each of 32 requests at a time, with one valid key;
- `json` sends bodies of a megabyte of empty lists, with one valid key.

The neighbour's p95 should stay below twice its p95 without the attack (`p95_ratio`). Other work on the machine changes
both, so quiet and attacked times alternate (`--rounds`).

A client that is refused returns after some seconds. Prints one JSON object.
"""

import argparse
import asyncio
import base64
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

from benchmarks.gateway import RunningGateway, gateway, picture

BYTE_INTERVAL_S: Final = 2.0
"""Time between two bytes of one connection."""
OPENED_PER_S: Final = 500
RETRY_DELAY_S: Final = (20.0, 40.0)
SOURCE_ADDRESSES: Final = 4
"""Number of local addresses of the slow clients. One address has 28,000 ports, and a port stays in use for a while."""
QUIET_S: Final = 10
ATTACKS: Final = ("slow", "pipelined", "unknown-keys", "flood", "reconnect", "images", "json")
FLOOD_PROCESSES: Final = 2
FLOOD_CONNECTIONS: Final = 64
_HEAD: Final = "POST /v1/assessments?wait=5 HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/json\r\n"
_BODY: Final = "Content-Length: 1000000\r\n\r\n{"
_PIPELINED_S: Final = 15.0
"""A client that pipelines reads nothing for so long."""
_PROBLEM: Final = re.compile(rb"urn:sluice:problem:([a-z-]+)")


class SlowConnection(asyncio.Protocol):
    """The connection of one slow client."""

    def __init__(self, slow_clients: "SlowClients", kind: str, start: bytes) -> None:
        self._clients = slow_clients
        self._kind = kind
        self._start = start
        self._answer = b""
        self.closed = asyncio.Event()
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._clients.open[self] = None
        transport.write(self._start)
        if self._kind == "half-closed":
            transport.write_eof()

    def data_received(self, data: bytes) -> None:
        self._answer = (self._answer + data)[:4096]

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, _: Exception | None) -> None:
        self.closed.set()
        if self._clients.open.pop(self, self) is None:
            self._clients.count_result(self._kind, self._answer)

    def send_byte(self) -> None:
        if self._kind != "half-closed" and not self._transport.is_closing():
            self._transport.write(b"x")


class SlowClients:
    """All slow clients of one run."""

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
        self.open: dict[SlowConnection, None] = {}
        self._peak = 0
        self._attempts: Counter[str] = Counter()
        self._results: dict[str, Counter[str]] = {kind: Counter() for kind in self._starts}

    def count_result(self, kind: str, answer: bytes) -> None:
        """Count the result of a closed connection."""
        problem = _PROBLEM.search(answer)
        result = f"{answer[9:12].decode()} {problem[1].decode() if problem else ''}".strip()
        self._results[kind][result or "closed without an answer"] += 1

    async def run(self, seconds: float) -> dict[str, Any]:
        """Keep the slow connections open for this long; return the counts."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        clients = [asyncio.create_task(self._client(number)) for number in range(self._connections)]
        while loop.time() < until:
            began = loop.time()
            for number, slow in enumerate(list(self.open)):
                slow.send_byte()
                if number % 200 == 199:  # spread over the whole time
                    await asyncio.sleep(BYTE_INTERVAL_S * 200 / max(len(self.open), 200))
            await asyncio.sleep(max(0.0, began + BYTE_INTERVAL_S - loop.time()))
        for client in clients:
            client.cancel()
        peak, results = self._peak, {kind: dict(counts.most_common()) for kind, counts in self._results.items()}
        return {
            "attempts": sum(self._attempts.values()),
            "open_at_most": peak,
            "by_kind": dict(self._attempts),
            "ends": results,
        }

    async def _client(self, number: int) -> None:
        await asyncio.sleep(number / OPENED_PER_S)
        loop = asyncio.get_running_loop()
        kind, source = self._kinds[number % len(self._kinds)], f"127.0.0.{2 + number % SOURCE_ADDRESSES}"
        while True:
            slow = SlowConnection(self, kind, random.choice(self._starts[kind]))
            self._attempts[kind] += 1
            try:
                await loop.create_connection(lambda slow=slow: slow, *self._address, local_addr=(source, 0))
                self._peak = max(self._peak, len(self.open))
                await slow.closed.wait()
            except OSError as error:
                self._results[kind][f"not connected: {error.strerror}"] += 1
            await asyncio.sleep(random.uniform(*RETRY_DELAY_S))


class Attackers:
    """The clients of one attack other than slow uploads: each sends its request again and again."""

    def __init__(self, attack: str, url: str, key: str) -> None:
        self._attack = attack
        self._url = url
        self._key = key
        self._answers: Counter[str] = Counter()

    async def run(self, connections: int, seconds: float) -> dict[str, Any]:
        """Attack for this long; return the counts of answers."""
        clients = {"images": 32, "json": 6}.get(self._attack, connections)
        if self._attack in {"flood", "reconnect"}:
            clients = FLOOD_CONNECTIONS
        attacking = [asyncio.create_task(self._repeat(number)) for number in range(clients)]
        await asyncio.sleep(seconds)
        for each in attacking:
            each.cancel()
        await asyncio.gather(*attacking, return_exceptions=True)
        return {"clients": clients, "answers": dict(self._answers.most_common())}

    async def _repeat(self, number: int) -> None:
        while True:
            try:
                if self._attack in {"flood", "reconnect"}:
                    await self._flood(number, is_kept=self._attack == "flood")
                    continue
                answer = await (self._pipeline() if self._attack == "pipelined" else self._request(number))
            except (OSError, httpx.HTTPError) as error:
                answer = type(error).__name__
            self._answers[answer] += 1
            await asyncio.sleep(random.uniform(0.1, 0.5))

    async def _pipeline(self) -> str:
        parts = urlsplit(self._url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1024)
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(b"GET /openapi.json HTTP/1.1\r\nHost: gateway\r\n\r\n" * 200)
        try:
            await asyncio.sleep(_PIPELINED_S)
            reader._transport.resume_reading()  # type: ignore[attr-defined]
            async with asyncio.timeout(5):
                while await reader.read(65_536):
                    pass
        except TimeoutError:
            return f"still open after {_PIPELINED_S:g} s"
        finally:
            writer.transport.abort()
        return "closed by the gateway"

    async def _flood(self, number: int, *, is_kept: bool) -> None:
        """Send requests on one connection until it is closed, or only one request."""
        parts = urlsplit(self._url)
        key = f"sk-sluice-{os.getpid():08x}{number:08x}-{'A' * 43}"
        request = f"GET /v1/assessments/a HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer {key}\r\n\r\n".encode()
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            while True:
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                self._answers[head[9:12].decode()] += 1
                length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
                await reader.readexactly(int(length[1]) if length else 0)
                if not is_kept:
                    return
        except asyncio.IncompleteReadError:
            self._answers["closed"] += 1
        finally:
            writer.transport.abort()

    async def _request(self, number: int) -> str:
        key, body = self._key, b"{}"
        if self._attack == "unknown-keys":
            key = f"sk-sluice-{number:016x}-{'A' * 43}"
        elif self._attack == "json":
            body = b'{"input": "data:", "x": [' + b"[]," * 350_000 + b"[]]}"
        else:
            image = base64.b64encode(picture(224, "JPEG")).decode()
            part = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{image}"}}
            body = json.dumps({"input": [part] * 16}).encode()
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        async with httpx.AsyncClient(base_url=self._url, headers=headers, timeout=60) as client:
            return str((await client.post("/v1/moderations", content=body)).status_code)


async def measure_neighbour(url: str, key: str, seconds: float) -> dict[str, Any]:
    """Request one assessment after the other, on a kept connection and on a new connection in turn."""
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


async def run_child(*arguments: str, stdin: str = "") -> Any:
    """Run this program with these arguments; return its JSON output."""
    command = (sys.executable, "-m", "benchmarks.gateway_slow", *arguments)
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
    output, _ = await process.communicate(stdin.encode())
    if process.returncode:
        raise RuntimeError(f"{arguments[0]} failed")
    return json.loads(output)


class GatewayProcess:
    """Memory and open files of this process, which runs the gateway."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.peak_mib = self.mib()
        self._files = self.files()
        self.peak_files = 0

    def mib(self) -> float:
        return round(self._process.memory_info().rss / (1 << 20), 1)

    def files(self) -> int:
        return len(os.listdir("/proc/self/fd"))

    async def record_peaks(self) -> None:
        while True:
            self.peak_mib = max(self.peak_mib, self.mib())
            self.peak_files = max(self.peak_files, self.files() - self._files)
            await asyncio.sleep(0.25)


async def attack_once(url: str, slow_keys: list[str], connections: int, seconds: float, attack: str) -> list[Any]:
    """Run the attackers in processes of their own. Returns their counts."""
    arguments = ("--slow-clients", url, "--connections", str(connections), "--seconds", str(seconds))
    processes = FLOOD_PROCESSES if attack in {"flood", "reconnect"} else 1
    children = [run_child(*arguments, "--attack", attack, stdin="\n".join(slow_keys)) for _ in range(processes)]
    return list(await asyncio.gather(*children))


async def measure(running: RunningGateway, given: argparse.Namespace) -> dict[str, Any]:
    """Measure the neighbour without and beside the attack in turn."""
    slow_keys = [running.keys.create(f"slow client {number}", "moderate")[1] for number in range(given.keys)]
    _, neighbour_key = running.keys.create("neighbour", "moderate", tenant="neighbour")
    neighbour = ("--neighbour", running.url, neighbour_key)
    await run_child(*neighbour, "--seconds", "5")  # warms up
    process = GatewayProcess()
    before_mib = process.mib()
    seconds = given.seconds / given.rounds
    took: dict[str, dict[str, list[float]]] = {when: {"kept": [], "new": []} for when in ("without", "with")}
    errors: dict[str, Counter[str]] = {"without": Counter(), "with": Counter()}
    attackers = []
    recording = asyncio.create_task(process.record_peaks())
    for _ in range(given.rounds):
        for when in ("without", "with"):
            if when == "with":
                attacking = asyncio.create_task(
                    attack_once(running.url, slow_keys, given.connections, seconds + 4, given.attack)
                )
                await asyncio.sleep(2)  # the attackers start
            measured = await run_child(*neighbour, "--seconds", str(seconds if when == "with" else QUIET_S))
            if when == "with":
                attackers += await attacking
            errors[when].update(measured["errors"])
            for name in took[when]:
                took[when][name] += measured["ms"][name]
        await asyncio.sleep(2)
    recording.cancel()
    figures: dict[str, Any] = {"load": os.getloadavg(), "connections_held_at_most": process.peak_files}
    for name in ("kept", "new"):
        alone, beside = summary(took["without"][name]), summary(took["with"][name])
        ratios = {f"{p}_ratio": round(beside[f"{p}_ms"] / alone[f"{p}_ms"], 2) for p in ("p50", "p95")}
        figures[f"neighbour_{name}_connection"] = {"without": alone, "with": beside, **ratios}
    figures["neighbour_errors"] = {when: dict(counts) for when, counts in errors.items()}
    figures["gateway_mib"] = {"before": before_mib, "at_most": process.peak_mib, "after": process.mib()}
    return figures | {"attackers": attackers if given.attack == "slow" else sum_answers(attackers)}


def sum_answers(attackers: list[Any]) -> dict[str, int]:
    """Add the answers of all rounds and processes."""
    answers: Counter[str] = Counter()
    for each in attackers:
        answers.update(each["answers"])
    return dict(answers.most_common())


async def serve(given: argparse.Namespace) -> None:
    async with gateway("tiny") as running:
        print(json.dumps(await measure(running, given), indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--keys", type=int, default=1, help="valid API keys of the slow clients")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--attack", choices=ATTACKS, default="slow")
    parser.add_argument("--rounds", type=int, default=1, help="quiet and attacked times in turn; they share --seconds")
    parser.add_argument("--slow-clients", metavar="URL", help=argparse.SUPPRESS)
    parser.add_argument("--neighbour", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    try_install_uvloop()  # the loop that Ray gives its workers
    if given.slow_clients:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        if given.attack != "slow":
            attackers = Attackers(given.attack, given.slow_clients, sys.stdin.read().split()[0])
            print(json.dumps(asyncio.run(attackers.run(given.connections, given.seconds))))
            return
        slow_clients = SlowClients(given.slow_clients, sys.stdin.read().split(), given.connections)
        print(json.dumps(asyncio.run(slow_clients.run(given.seconds))))
    elif given.neighbour:
        print(json.dumps(asyncio.run(measure_neighbour(*given.neighbour, given.seconds))))
    else:
        with suppress(KeyboardInterrupt):
            asyncio.run(serve(given))


if __name__ == "__main__":
    main()

"""All stream systems behind one set of fixtures: `streams` has settings of its own for every test."""

import asyncio
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from services.core.processes import SupervisedProcess
from services.core.settings import Settings
from services.streams.base import GroupConsumer, Message, OutgoingMessage, Publisher, Reader
from services.streams.config import StreamConfig
from services.streams.factory import open_consumer, open_publisher, open_reader
from tests.support.kafka_broker import Broker
from tests.support.memory_streams import MemoryBroker, MemoryGroupConsumer, MemoryPublisher, MemoryReader
from tests.support.servers import Valkey

KINDS = ["memory", "redis", pytest.param("kafka", marks=pytest.mark.kafka)]
MEMBERS = [*KINDS, pytest.param("kafka exactly once", marks=pytest.mark.kafka)]
"""Only on Kafka does the delivery make a difference to a member."""
SERVERS = MEMBERS[1:]
"""Those that can have an outage."""

PATIENT: Final[dict[str, Any]] = {"redis_claim_idle_s": 60.0, "session_timeout_ms": 45_000}
"""Members that take nothing over before a minute has passed."""


class Streams:
    """The streams of one test, on one server, and the members that the test opened."""

    def __init__(self, kind: str, url: str) -> None:
        self.url = url
        self._memory = MemoryBroker() if kind == "memory" else None
        self.delivery = "exactly_once" if "exactly once" in kind else "at_least_once"
        self.name = f"test-{uuid.uuid4().hex[:12]}"
        self._opened: list[Any] = []

    def settings(self, **overrides: Any) -> Settings:
        """Settings with short timeouts, so that a dead member is noticed soon."""
        options = {"session_timeout_ms": 2_000, "heartbeat_interval_ms": 300, "max_poll_interval_ms": 2_500}
        options |= {name: overrides.pop(name) for name in tuple(overrides) if name in options}
        arguments: dict[str, Any] = {
            "stream_url": self.url,
            "redis_url": self.url if self.url.startswith("redis") else "",
            "s3_buckets": ("uploads",),
            "policy_bucket": "policies",
            "model": "tiny",
            "group": f"{self.name}.group",
            "submissions_stream": f"{self.name}.submissions",
            "verdicts_stream": f"{self.name}.verdicts",
            "dead_letters_stream": f"{self.name}.dead-letters",
            "kafka_options": options,
            "kafka_partitions": 3,
            "delivery": self.delivery,
            "redis_claim_idle_s": 1.0,
        }
        return Settings(**(arguments | overrides))

    async def member(self, name: str = "member", **overrides: Any) -> GroupConsumer:
        config = StreamConfig.from_settings(self.settings(**overrides))
        member: GroupConsumer
        if self._memory is not None:
            member = MemoryGroupConsumer(
                self._memory, config.submissions_stream, config.group, config.redis_claim_idle_s
            )
        else:
            member = await open_consumer(config, name)
        self._opened.append(member)
        return member

    async def kill_member_holding(self, count: int, directory: Path) -> None:
        """Let a member receive `count` messages, and kill it before it settles any of them."""
        if self._memory is not None:
            doomed: Any = await self.member("doomed")
            await collect(doomed, count)
            doomed.kill()
            return
        argv = [sys.executable, "-m", "tests.streams.member", self.settings().model_dump_json()]
        process = SupervisedProcess(argv, log=directory / "log")

        async def all_held() -> bool:
            assert process.returncode is None, process.tail()
            return process.tail().count("received") == count

        try:
            await eventually(all_held)
        finally:
            process.kill()

    async def publisher(self) -> Publisher:
        if self._memory is not None:
            return MemoryPublisher(self._memory)
        return await open_publisher(StreamConfig.from_settings(self.settings()))

    async def reader(self) -> Reader:
        if self._memory is not None:
            return MemoryReader(self._memory)
        return await open_reader(StreamConfig.from_settings(self.settings()))

    async def publish(self, *records: OutgoingMessage) -> None:
        publisher = await self.publisher()
        try:
            await publisher.publish(records)
        finally:
            await publisher.close()

    async def submit(self, *values: str, key: bytes | None = b"one key, so one partition") -> None:
        stream = self.settings().submissions_stream
        await self.publish(*(OutgoingMessage(stream, value.encode(), key) for value in values))

    def verdict(self, value: str) -> OutgoingMessage:
        return OutgoingMessage(self.settings().verdicts_stream, value.encode(), b"key", (("kind", b"verdict"),))

    async def verdicts(self) -> list[str]:
        return sorted(message.value.decode() for message in await self.everything(self.settings().verdicts_stream))

    async def everything(self, stream: str) -> list[Message]:
        reader = await self.reader()
        try:
            return [message async for message in reader.read(stream, follow=False)]
        finally:
            await reader.close()

    async def close(self) -> None:
        await asyncio.gather(*(each.close() for each in self._opened))


async def collect(transport: GroupConsumer, count: int, within_s: float = 20.0) -> list[Message]:
    """Receive until there are `count` messages; fails when no more come within `within_s`."""
    messages: list[Message] = []
    deadline = time.monotonic() + within_s
    while len(messages) < count:
        assert time.monotonic() < deadline, f"{len(messages)} of {count} messages, and no more within {within_s} s"
        if received := await transport.receive(count - len(messages), 0.5):
            messages += received
            deadline = time.monotonic() + within_s
    return messages


async def eventually(condition: Callable[[], Awaitable[Any]], within_s: float = 20.0) -> Any:
    """Wait until `condition` returns something true, and return it."""
    deadline = time.monotonic() + within_s
    while True:
        asked = time.monotonic()
        if value := await condition():
            return value
        assert asked < deadline, f"did not come true within {within_s} s"
        await asyncio.sleep(0.05)


async def reach(
    target: float,
    count: Callable[[], Awaitable[int]],
    *,
    stalled_s: float = 60.0,
    describe: Callable[[], Awaitable[str]] | None = None,
) -> None:
    """Wait until `count` returns `target` or more.

    It fails when the count has not grown for `stalled_s`, however long it takes in all: a busy machine is slow. The
    failure shows what `describe` returns.
    """
    best, grown = -1, time.monotonic()
    while True:
        asked = time.monotonic()
        current = await count()
        if current >= target:
            return
        if current > best:
            best, grown = current, time.monotonic()
        elif asked - grown > stalled_s:
            details = f"\n{await describe()}" if describe is not None else ""
            pytest.fail(f"{best} of {target:g}, and no more within {stalled_s:g} s{details}")
        await asyncio.sleep(0.05)


def values(messages: Sequence[Message]) -> list[str]:
    return [message.value.decode() for message in messages]


async def settle_in_order(transport: GroupConsumer, *settlements: tuple[Message, Sequence[OutgoingMessage]]) -> None:
    """Settle one after the other, without waiting for the older messages of a partition that come later."""
    settling = []
    for message, records in settlements:
        settling.append(asyncio.create_task(transport.settle(message, records)))
        await asyncio.sleep(0)
    await asyncio.gather(*settling)


@pytest.fixture(params=MEMBERS)
async def streams(request: pytest.FixtureRequest) -> AsyncIterator[Streams]:
    """On the session's server of each kind."""
    if request.param == "memory":
        url = ""
    elif request.param == "redis":
        url = request.getfixturevalue("valkey_url")
    else:
        url = f"kafka://{request.getfixturevalue('kafka_address')}"
    streams = Streams(request.param, url)
    yield streams
    await streams.close()


@pytest.fixture(params=SERVERS)
async def served(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[Streams, Broker | Valkey]]:
    """On a running server that the test may kill and start again: the session's broker for outages, or a Valkey."""
    if request.param == "redis":
        server: Broker | Valkey = Valkey(tmp_path)
        await asyncio.to_thread(server.start)
    else:
        server = request.getfixturevalue("outage_broker")
        if not server.is_running:
            await asyncio.to_thread(server.start)
    streams = Streams(request.param, f"kafka://{server.address}" if isinstance(server, Broker) else server.url)
    yield streams, server
    await streams.close()
    if isinstance(server, Valkey):
        server.kill()

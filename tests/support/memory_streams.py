"""Streams in the memory of one event loop: a `GroupConsumer`, `Publisher` and `Reader` for tests without a server.

As on Redis Streams, a message belongs to the member that received it last, and settling is one act. A member renews its
messages every third of its `claim_idle_s`. A message that was not renewed for the `claim_idle_s` of another member is
taken over by it. There is no outage, and there are no partitions.
"""

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Final

from services.core.errors import NotOwned
from services.streams.base import Lag, Message, OutgoingMessage

_CHECK_S: Final = 0.05
"""How often a receiving member looks for abandoned messages."""


@dataclass(slots=True)
class _Pending:
    """A message that a member has received and not settled."""

    owner: "MemoryGroupConsumer"
    attempts: int
    received_at: float

    def idle_s(self, now: float) -> float:
        """The time since the owner received or renewed it."""
        ended_at = self.owner.ended_at
        if ended_at is not None:
            return now - ended_at
        return (now - self.received_at) % (self.owner.claim_idle_s / 3)


@dataclass(slots=True)
class _Group:
    delivered: int = 0
    """Messages of the stream that some member has received."""
    pending: dict[int, _Pending] = field(default_factory=dict)
    """By the position in the stream, in the order of the positions."""


class MemoryBroker:
    """All streams and groups of one test."""

    def __init__(self) -> None:
        self.streams: defaultdict[str, list[Message]] = defaultdict(list)
        self.groups: defaultdict[tuple[str, str], _Group] = defaultdict(_Group)
        self.changed = asyncio.Condition()

    async def publish(self, records: Sequence[OutgoingMessage]) -> None:
        """Append the records, all at once."""
        for each in records:
            log = self.streams[each.stream]
            source = f"{each.stream}/{len(log)}"
            log.append(Message(each.value, each.key, tuple(each.headers), source, datetime.now(UTC), token=len(log)))
        async with self.changed:
            self.changed.notify_all()


class MemoryGroupConsumer:
    """One member of a group. See `GroupConsumer`."""

    def __init__(self, broker: MemoryBroker, stream: str, group: str, claim_idle_s: float) -> None:
        self._broker = broker
        self._log = broker.streams[stream]
        self._group = broker.groups[stream, group]
        self.claim_idle_s = claim_idle_s
        self.ended_at: float | None = None
        """By `time.monotonic`; None while the member renews its messages."""
        self._closed = False

    async def receive(self, max_messages: int, timeout_s: float) -> Sequence[Message]:
        """Abandoned messages first, then new ones."""
        deadline = time.monotonic() + timeout_s
        while True:
            batch = self._take(max_messages)
            remaining_s = deadline - time.monotonic()
            if batch or remaining_s <= 0:
                return batch
            async with self._broker.changed:
                try:
                    await asyncio.wait_for(self._broker.changed.wait(), min(remaining_s, _CHECK_S))
                except TimeoutError:
                    continue

    def _take(self, max_messages: int) -> list[Message]:
        now = time.monotonic()
        pending = self._group.pending
        others = [(at, each) for at, each in pending.items() if each.owner is not self]
        abandoned = [at for at, each in others if each.idle_s(now) > self.claim_idle_s]
        batch = []
        for at in abandoned[:max_messages]:
            attempts = pending[at].attempts + 1
            pending[at] = _Pending(self, attempts, now)
            batch.append(replace(self._log[at], attempts=attempts))
        while len(batch) < max_messages and self._group.delivered < len(self._log):
            at = self._group.delivered
            self._group.delivered += 1
            pending[at] = _Pending(self, 1, now)
            batch.append(self._log[at])
        return batch

    async def settle(self, message: Message, records: Sequence[OutgoingMessage]) -> None:
        """Publish and acknowledge without a pause in between."""
        pending = self._group.pending.get(message.token)
        if self._closed or pending is None or pending.owner is not self:
            raise NotOwned(f"{message.source} belongs to another member now.")
        del self._group.pending[message.token]
        await self._broker.publish(records)

    async def lag(self) -> Lag:
        """Messages that are pending or not delivered, as one partition."""
        waiting = len(self._group.pending) + len(self._log) - self._group.delivered
        return Lag({0: waiting}, published=len(self._log))

    def find_head_of_line_messages(self) -> Sequence[Message]:
        """Messages are acknowledged one by one: none waits for another."""
        return ()

    async def close(self) -> None:
        """Leave the group: the next member that receives takes the held messages over."""
        self._closed = True
        self.ended_at = -math.inf

    def kill(self) -> None:
        """Stop without leaving the group, as a process does that is killed."""
        self.ended_at = time.monotonic()


class MemoryPublisher:
    """See `Publisher`."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.publish = broker.publish

    async def close(self) -> None:
        """There is nothing to release."""


class MemoryReader:
    """See `Reader`."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker

    async def read(self, stream: str, *, follow: bool, since: datetime | None = None) -> AsyncIterator[Message]:
        """In the order of publication."""
        log, at = self._broker.streams[stream], 0
        end = len(log)
        while follow or at < end:
            while at == len(log):
                async with self._broker.changed:
                    await self._broker.changed.wait()
            if since is None or log[at].timestamp >= since:
                yield log[at]
            at += 1

    async def close(self) -> None:
        """There is nothing to release."""

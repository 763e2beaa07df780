"""Crash isolation finds the message that crashes intake processes, and protects the other messages.

Each process registers in Redis the messages that it has in flight, before it touches them, and sends a heartbeat. When
the heartbeat of a process stops, the other processes count one crash for each message that it had registered:

- A message with one crash is **suspected**: it runs beside a few other suspected messages at most.
- A message with two crashes is **isolated**: it runs alone in its process.
- A message with three crashes is **confirmed poison**: it ran alone in the last one. It is not touched again and
  becomes a dead letter. Messages that only ran beside it are not blamed.

Neither restriction lasts longer than `_ISOLATION_S`, so a message that waits, for example for S3, does not hold up the
others. Delivery does not depend on this module: while Redis is down, messages are processed without registration.

`services.guard.slots` does the same for images and the engine, and uses the same three words.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Final, Self

from services.core.errors import GuardFailed, RedisUnavailable
from services.core.redis import RedisClient
from services.core.tasks import cancel_and_wait

MAX_CRASHES: Final = 3
"""A message with this many crashes is confirmed poison."""

_SUSPECT_CONCURRENCY: Final = 8
_HEARTBEAT_INTERVAL_S: Final = 1.0
_DEAD_AFTER_S: Final = 4.0
"""Without a heartbeat for this long, a process counts as crashed."""
_CRASH_COUNT_TTL_S: Final = 86_400
_ISOLATION_S: Final = 20.0
"""The longest time that other messages wait for a suspected or isolated one. A poison message crashes its process much
sooner."""

# Counts a crash for each message of the dead processes, then writes this process's heartbeat and the messages that it
# has in flight. Of the new messages (the last ones) only those without a crash are added. Returns the crashes of each.
_REGISTER_SCRIPT: Final = """
local alive, in_flight, prefix, me = KEYS[1], KEYS[2], ARGV[1], ARGV[2]
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
for _, dead in ipairs(redis.call('ZRANGEBYSCORE', alive, '-inf', now - ARGV[3])) do
    if dead ~= me then
        for _, source in ipairs(redis.call('SMEMBERS', prefix .. 'in-hand:' .. dead)) do
            redis.call('INCR', prefix .. 'crashes:' .. source)
            redis.call('EXPIRE', prefix .. 'crashes:' .. source, ARGV[4])
        end
        redis.call('DEL', prefix .. 'in-hand:' .. dead)
        redis.call('ZREM', alive, dead)
    end
end
redis.call('ZADD', alive, now, me)
redis.call('DEL', in_flight)
local crashes = {}
for i = 6, #ARGV do
    local is_new = i - 5 > tonumber(ARGV[5])
    local count = is_new and tonumber(redis.call('GET', prefix .. 'crashes:' .. ARGV[i])) or 0
    if count == 0 then redis.call('SADD', in_flight, ARGV[i]) end
    if is_new then crashes[#crashes + 1] = count end
end
return crashes
"""
_LEAVE_SCRIPT: Final = "redis.call('ZREM', KEYS[1], ARGV[1]) redis.call('DEL', KEYS[2])"

log = logging.getLogger(__name__)


def poison_error() -> GuardFailed:
    """The error of a message that is confirmed poison."""
    return GuardFailed(f"it made a worker crash {MAX_CRASHES} times")


@contextmanager
def _limit_isolation(end_isolation: Callable[[], None]) -> Iterator[None]:
    """Call `end_isolation` at the end of the block, or after `_ISOLATION_S`, whichever comes first."""
    timer = asyncio.create_task(asyncio.sleep(_ISOLATION_S))
    timer.add_done_callback(lambda _: end_isolation())
    try:
        yield
    finally:
        timer.cancel()


class CrashIsolation:
    """Decides which messages one intake process may process at the same time. Use it as an async context manager."""

    def __init__(self, redis: RedisClient, group: str, member: str) -> None:
        """`member` is the name of this process. A restarted process needs another name."""
        self._redis = redis
        self._prefix = f"sluice:{group}:"
        self._member = member
        self._in_flight: set[str] = set()
        self._updating = asyncio.Lock()
        self._redis_down = False
        """Whether Redis failed to answer the last call. Then only the heartbeat calls it, so that a hanging server does
        not slow down the processing."""
        self._suspect_slots = asyncio.Semaphore(_SUSPECT_CONCURRENCY)
        self._running = 0
        self._exclusive_source: str | None = None
        """The message that runs alone."""
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._heartbeats = asyncio.create_task(self._send_heartbeats())
        return self

    async def __aexit__(self, *_: object) -> None:
        await cancel_and_wait(self._heartbeats)
        with suppress(RedisUnavailable):
            await self._redis.run(_LEAVE_SCRIPT, self._keys, self._member)

    async def register(self, sources: Sequence[str]) -> list[int]:
        """Return the crashes of each message. Messages without a crash are in flight until `release`."""
        if not self._redis_down:
            return await self._update_registry(sources) if sources else []
        self._in_flight.update(sources)  # the heartbeat registers them when Redis is back
        return [0] * len(sources)

    def release(self, source: str) -> None:
        """Mark the message as no longer in flight."""
        self._in_flight.discard(source)

    @asynccontextmanager
    async def isolate(self, source: str, crashes: int, *, parse: bool = False) -> AsyncIterator[None]:
        """Wait until a message with that many crashes may be processed, and keep its restriction during the block.

        With `parse` the block only parses the message. That takes a moment, so a suspected message does not wait for
        one of the few slots then.
        """
        if parse and crashes < MAX_CRASHES - 1:
            async with self._keep_registered(source):
                yield
        elif crashes == 0:
            async with self._run_unrestricted():
                yield
        elif crashes < MAX_CRASHES - 1:
            async with self._run_limited(source):
                yield
        else:
            async with self._run_exclusively(source):
                yield

    @asynccontextmanager
    async def _run_unrestricted(self) -> AsyncIterator[None]:
        await self._wait_until(lambda: self._exclusive_source is None)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            self._notify()

    @asynccontextmanager
    async def _run_limited(self, source: str) -> AsyncIterator[None]:
        await self._suspect_slots.acquire()
        with _limit_isolation(self._suspect_slots.release):
            async with self._run_unrestricted(), self._keep_registered(source):
                yield

    @asynccontextmanager
    async def _run_exclusively(self, source: str) -> AsyncIterator[None]:
        await self._wait_until(lambda: self._exclusive_source is None)
        self._exclusive_source = source

        def end_isolation() -> None:
            self._exclusive_source = None
            self.release(source)  # a crash from here on may be caused by another message
            self._notify()

        with _limit_isolation(end_isolation):
            await self._wait_until(lambda: not self._running or self._exclusive_source != source)
            if self._exclusive_source == source:
                await self._add_in_flight(source)
            yield

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()  # wakes every waiting task, which then checks its condition
        self._changed.clear()

    @asynccontextmanager
    async def _keep_registered(self, source: str) -> AsyncIterator[None]:
        try:
            await self._add_in_flight(source)
            yield
        finally:
            self.release(source)

    async def _add_in_flight(self, source: str) -> None:
        self._in_flight.add(source)
        if not self._redis_down:
            await self._update_registry()

    async def _update_registry(self, new: Sequence[str] = ()) -> list[int]:
        async with self._updating:
            arguments: tuple[str | float, ...] = (
                self._prefix,
                self._member,
                _DEAD_AFTER_S,
                _CRASH_COUNT_TTL_S,
                len(self._in_flight),
                *self._in_flight,
            )
            try:
                crashes: list[int] = await self._redis.run(_REGISTER_SCRIPT, self._keys, *arguments, *new)
                self._redis_down = False
            except RedisUnavailable as error:
                log.debug("Redis is unavailable; messages are processed without crash isolation: %s", error)
                crashes = [0] * len(new)
                self._redis_down = True
            self._in_flight.update(source for source, count in zip(new, crashes, strict=True) if count == 0)
            return crashes

    async def _send_heartbeats(self) -> None:
        while True:
            await self._update_registry()
            await asyncio.sleep(_HEARTBEAT_INTERVAL_S)

    @property
    def _keys(self) -> list[str]:
        return [f"{self._prefix}alive", f"{self._prefix}in-hand:{self._member}"]

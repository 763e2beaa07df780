"""The registry of messages in flight, in Redis: it counts the crashes of each message.

Each process registers the messages that it has in flight, before it touches them, and sends a heartbeat. When the
heartbeat of a process stops, the other processes count one crash for each message that it had registered.

Delivery does not depend on the registry: while Redis is down, messages are processed without registration.
"""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, Self

from services.core.errors import RedisUnavailable
from services.core.redis import RedisClient
from services.core.tasks import cancel_and_wait

_HEARTBEAT_INTERVAL_S: Final = 1.0
_DEAD_AFTER_S: Final = 4.0
"""Without a heartbeat for this long, a process counts as crashed."""
_CRASH_COUNT_TTL_S: Final = 86_400

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
# The keys `alive` (heartbeats) and `in-hand:<member>` (messages in flight) have their names since version 0.1.0.
_LEAVE_SCRIPT: Final = "redis.call('ZREM', KEYS[1], ARGV[1]) redis.call('DEL', KEYS[2])"

log = logging.getLogger(__name__)


class CrashRegistry:
    """The messages that one process has in flight. Use it as an async context manager, which sends the heartbeats."""

    def __init__(self, redis: RedisClient, group: str, member: str) -> None:
        """`member` is the name of this process. A restarted process needs another name."""
        self.in_flight: set[str] = set()
        """The sources of the messages for which a crash of this process counts."""
        self._redis = redis
        self._prefix = f"sluice:{group}:"
        self._member = member
        self._updating = asyncio.Lock()
        self._redis_down = False
        """Whether Redis failed to answer the last call. Then only the heartbeat calls it, so that a hanging server does
        not slow down the processing."""

    async def __aenter__(self) -> Self:
        self._heartbeats = asyncio.create_task(self._send_heartbeats())
        return self

    async def __aexit__(self, *_: object) -> None:
        await cancel_and_wait(self._heartbeats)
        with suppress(RedisUnavailable):
            await self._redis.run(_LEAVE_SCRIPT, self._keys, self._member)

    async def register(self, sources: Sequence[str]) -> list[int]:
        """Return the crashes of each message. Messages without a crash are in flight until `remove`."""
        if not self._redis_down:
            return await self.update(sources) if sources else []
        self.in_flight.update(sources)  # the heartbeat registers them when Redis is back
        return [0] * len(sources)

    async def add(self, source: str) -> None:
        """Register a message, even if it has crashes."""
        self.in_flight.add(source)
        if not self._redis_down:
            await self.update()

    def remove(self, source: str) -> None:
        """Mark the message as no longer in flight. The next heartbeat tells Redis."""
        self.in_flight.discard(source)

    async def update(self, new: Sequence[str] = ()) -> list[int]:
        """Send a heartbeat and the messages in flight. Return the crashes of the `new` messages."""
        async with self._updating:
            arguments: tuple[str | float, ...] = (
                self._prefix,
                self._member,
                _DEAD_AFTER_S,
                _CRASH_COUNT_TTL_S,
                len(self.in_flight),
                *self.in_flight,
            )
            try:
                answer: list[int] = await self._redis.run(_REGISTER_SCRIPT, self._keys, *arguments, *new)
                crashes = [max(0, count) for count in answer]
                self._redis_down = False
            except RedisUnavailable as error:
                log.debug("Redis is unavailable; messages are processed without crash isolation: %s", error)
                crashes = [0] * len(new)
                self._redis_down = True
            self.in_flight.update(source for source, count in zip(new, crashes, strict=True) if count == 0)
            return crashes

    async def _send_heartbeats(self) -> None:
        while True:
            await self.update()
            await asyncio.sleep(_HEARTBEAT_INTERVAL_S)

    @property
    def _keys(self) -> list[str]:
        return [f"{self._prefix}alive", f"{self._prefix}in-hand:{self._member}"]

"""How much of the gateway one API key gets: requests a second over all gateways, and requests at a time in this one.

Written here because the well-kept libraries (limits, pyrate-limiter) do not go with redis-py 8 yet, or take several
round trips.
"""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from services.core.errors import RedisUnavailable
from services.core.redis import RedisClient
from services.core.settings import Settings
from services.gateway.api_keys import ApiKey
from services.gateway.problems import HttpProblem

_BURST_S: Final = 2.0
"""Seconds of its rate that a key may use at once."""
_REDIS_AWAY_S: Final = 5.0
"""How long this process counts alone before it asks Redis again."""
_REMEMBERED: Final = 10_000

_TAKE: Final = """
local now = redis.call('TIME')
now = now[1] + now[2] / 1000000
local due = math.max(tonumber(redis.call('GET', KEYS[1]) or now), now)
local wait = due - now - ARGV[2]
if wait > 0 then return tostring(wait) end
redis.call('SET', KEYS[1], string.format('%.6f', due + ARGV[1]), 'EX', math.ceil(ARGV[2] + ARGV[1]) + 1)
return '0'
"""
"""GCRA, a token bucket in one number: when the key's next request would be due at an even pace."""


class RateLimiter:
    """The limits of all keys. A key over one of them gets a HttpProblem that says when to come again."""

    def __init__(self, shared: RedisClient, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._shared = shared
        self._rate_per_s = settings.gateway_rate_per_s
        self._concurrency = settings.gateway_concurrency
        self._clock = clock
        self._alone_until = float("-inf")
        self._due: OrderedDict[str, float] = OrderedDict()
        self._refused_until: OrderedDict[str, float] = OrderedDict()
        self._running = Counter[str]()

    async def acquire(self, key: ApiKey) -> None:
        """Count a request. While Redis is away each gateway counts alone.

        Raises:
            HttpProblem: the key has had its share.
        """
        rate = key.rate_per_s or self._rate_per_s
        # What is due only moves away: until then nobody needs to be asked, which makes floods cheap.
        wait_s = self._refused_until.get(key.id, float("-inf")) - self._clock()
        if wait_s <= 0:
            wait_s = await self._wait_s(key.id, 1 / rate, max(_BURST_S, 1 / rate))
        if wait_s > 0:
            _remember(self._refused_until, key.id, self._clock() + wait_s)
            raise HttpProblem(
                "rate-limited",
                f"this API key may send {rate:g} requests a second; come again in {wait_s:.1f} s",
                retry_after_s=wait_s,
            )

    @contextmanager
    def concurrency_slot(self, key: ApiKey, what: str) -> Iterator[None]:
        """Count one more at a time for as long as the block runs; `what` (requests, jobs) is counted by itself.

        Raises:
            HttpProblem: the key has as many as it may have.
        """
        limit, entry = key.concurrency or self._concurrency, f"{what}:{key.id}"
        if self._running[entry] >= limit:
            raise HttpProblem("too-many-at-once", f"this API key may have {limit} {what} at a time")
        self._running[entry] += 1
        try:
            yield
        finally:
            self._running[entry] -= 1
            if not self._running[entry]:
                del self._running[entry]

    async def _wait_s(self, key_id: str, step_s: float, burst_s: float) -> float:
        """How long the key has to wait before its next request; not at all where this one is counted."""
        if self._clock() >= self._alone_until:
            try:
                name = self._shared.key("gateway", "rate", key_id)
                return float(await self._shared.run(_TAKE, [name], step_s, burst_s))
            except RedisUnavailable:
                self._alone_until = self._clock() + _REDIS_AWAY_S
        return self._take_alone(key_id, step_s, burst_s)

    def _take_alone(self, key_id: str, step_s: float, burst_s: float) -> float:
        now = self._clock()
        due = max(self._due.get(key_id, now), now)
        wait_s = due - now - burst_s
        _remember(self._due, key_id, due + step_s if wait_s <= 0 else due)
        return wait_s


def _remember(times: OrderedDict[str, float], key_id: str, at: float) -> None:
    times[key_id] = at
    times.move_to_end(key_id)
    if len(times) > _REMEMBERED:
        times.popitem(last=False)

"""Limits of one API key: images a second in all gateways together, and concurrent requests in this gateway.

A request counts as one image. If it has more, the others are counted after its body was read (`RateLimiter.charge`).

The maintained libraries are not used: limits and pyrate-limiter do not support redis-py 8 yet, or need several round
trips for each request.
"""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

from services.core.errors import RedisUnavailable
from services.core.redis import RedisClient
from services.core.settings import Settings
from services.gateway.api_keys import ApiKey
from services.gateway.problems import HttpProblem

_BURST_S: Final = 2.0
"""A key may use this many seconds of its rate at once."""
_UNLIMITED_S: Final = 1e9
MAX_IMAGES: Final = 16
"""One request has at most so many images."""
_REDIS_RETRY_S: Final = 5.0
"""After an error of Redis, this process counts by itself for this long before it asks Redis again."""
_MAX_KEYS: Final = 10_000
"""This process keeps times for so many API keys. The key that was set longest ago is dropped first."""

_Times = TypeVar("_Times")

_ACQUIRE_SCRIPT: Final = """
local now = redis.call('TIME')
now = now[1] + now[2] / 1000000
local step, burst, longest = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local function set(due)
  redis.call('SET', KEYS[1], string.format('%.6f', due), 'EX', math.ceil(due - now) + 1)
end
local due = tonumber(redis.call('GET', KEYS[1]) or now) or now
if not (due >= now) then due = now end
if due > now + longest then
  due = now + longest
  set(due)
end
local wait = due - now - burst
if wait > 0 then return tostring(wait) end
set(due + step)
return '0'
"""
"""GCRA: a token bucket in one number, the time at which the key's next request is due at an even pace.

Returns the seconds until the key may send its next request, or 0 if this request is counted. A due time that no
request can have set was written by someone else. The latest possible one replaces it, so it delays the key only once.
"""


class RateLimiter:
    """The limits of all keys. A request over a limit gets an HttpProblem with the time for a retry."""

    def __init__(self, redis: RedisClient, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._redis = redis
        self._rate_per_s = settings.gateway_rate_per_s
        self._concurrency = settings.gateway_concurrency
        self._gateways = max(1, settings.gateway_replicas)
        self._clock = clock
        self._local_until = float("-inf")
        self._due: OrderedDict[str, float] = OrderedDict()
        self._refused: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """When to ask Redis again about a refused key, and when its next request is due."""
        self._in_use = Counter[str]()

    async def acquire(self, api_key: ApiKey) -> None:
        """Count one request. While Redis is unavailable, each gateway counts by itself.

        Raises:
            HttpProblem: the API key is over its rate.
        """
        rate, now = self._find_rate(api_key), self._clock()
        # The due time never moves back, so a refused key needs no Redis for a while. This makes floods cheap.
        ask_again_at, due_at = self._refused.get(api_key.id, (now, now))
        wait_s = due_at - now
        if now >= ask_again_at:
            wait_s = await self._acquire_or_wait_s(api_key, 1, max(_BURST_S, 1 / rate))
            if wait_s > 0:
                now = self._clock()
                # Asking again after the time of one image is cheap, too, and ends what a forged due time does soon.
                _set_bounded(self._refused, api_key.id, (now + min(wait_s, 1 / rate), now + wait_s))
        if wait_s > 0:
            raise HttpProblem(
                "rate-limited",
                f"this API key may send {rate:g} images a second; try again in {wait_s:.1f} s",
                retry_after_s=wait_s,
            )

    def is_refusing(self, api_key: ApiKey) -> bool:
        """Return whether the next request of a key would be refused without asking Redis."""
        return self._clock() < self._refused.get(api_key.id, (float("-inf"),))[0]

    async def charge(self, api_key: ApiKey, images: int) -> None:
        """Count more images of a request that `acquire` has counted. They delay later requests."""
        if images > 0:
            await self._acquire_or_wait_s(api_key, images, _UNLIMITED_S)

    def _find_rate(self, api_key: ApiKey) -> float:
        return api_key.rate_per_s or self._rate_per_s

    @contextmanager
    def concurrency_slot(self, api_key: ApiKey, what: str) -> Iterator[None]:
        """Count one request or job of an API key until the block ends.

        `what` is `requests` or `jobs`. Each has its own count.

        Raises:
            HttpProblem: the API key is at its limit.
        """
        limit, entry = api_key.concurrency or self._concurrency, f"{what}:{api_key.id}"
        if self._in_use[entry] >= limit:
            raise HttpProblem(
                "too-many-at-once", f"this API key may have {limit} {what} at a time; try again when one ends"
            )
        self._in_use[entry] += 1
        try:
            yield
        finally:
            self._in_use[entry] -= 1
            if not self._in_use[entry]:
                del self._in_use[entry]

    async def _acquire_or_wait_s(self, api_key: ApiKey, images: int, burst_s: float) -> float:
        """Return the seconds until the key may send its next request. 0 or less: these images are counted."""
        step_s = images / self._find_rate(api_key)
        if self._clock() >= self._local_until:
            try:
                redis_key = self._redis.key("gateway", "rate", api_key.id)
                longest_s = self._find_longest_delay_s(api_key)
                return float(await self._redis.run(_ACQUIRE_SCRIPT, [redis_key], step_s, burst_s, longest_s))
            except RedisUnavailable:
                self._local_until = self._clock() + _REDIS_RETRY_S
        return self._acquire_locally(api_key.id, step_s, burst_s)

    def _find_longest_delay_s(self, api_key: ApiKey) -> float:
        """Return how far ahead the requests of a key can move its due time.

        The last request within the rate is due after the burst. Then each concurrent request in all gateways of this
        deployment counts the rest of its images.
        """
        step_s = 1 / self._find_rate(api_key)
        requests = (api_key.concurrency or self._concurrency) * self._gateways
        return max(_BURST_S, step_s) + step_s * (1 + requests * (MAX_IMAGES - 1))

    def _acquire_locally(self, key_id: str, step_s: float, burst_s: float) -> float:
        now = self._clock()
        due = max(self._due.get(key_id, now), now)
        wait_s = due - now - burst_s
        _set_bounded(self._due, key_id, due + step_s if wait_s <= 0 else due)
        return wait_s


def _set_bounded(times: OrderedDict[str, _Times], key_id: str, at: _Times) -> None:
    times[key_id] = at
    times.move_to_end(key_id)
    if len(times) > _MAX_KEYS:
        times.popitem(last=False)

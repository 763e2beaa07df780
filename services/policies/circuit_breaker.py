"""The circuit breaker: a policy version whose block rate leaves its band stops blocking."""

import asyncio
import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Self

from services.core import telemetry
from services.core.errors import ConfigurationError, PolicyUnavailable, RedisUnavailable
from services.core.tasks import cancel_and_wait
from services.core.values import Action, BlockRateBand, Policy, PolicyIdentity
from services.policies.cache import PolicyCache
from services.policies.redis_cache import PolicyRedisCache
from services.policies.registry import PolicyRegistry
from services.policies.service import PolicyService

BREAKER: Final = "circuit breaker"
"""The `who` of its changes."""

_CHECK_INTERVAL_S: Final = 0.25
_WINDOW_SLICES: Final = 10
"""The window moves by this fraction of itself."""

_COUNT: Final = """
local now = math.floor(redis.call('TIME')[1] / ARGV[1])
redis.call('HINCRBY', KEYS[1], now .. ':judged', ARGV[3])
redis.call('HINCRBY', KEYS[1], now .. ':blocked', ARGV[4])
redis.call('EXPIRE', KEYS[1], math.ceil(2 * ARGV[1] * ARGV[2]))
local sums = {judged = 0, blocked = 0}
local entries = redis.call('HGETALL', KEYS[1])
for i = 1, #entries, 2 do
    local slice, what = string.match(entries[i], '(%d+):(%a+)')
    if tonumber(slice) > now - ARGV[2] then
        sums[what] = sums[what] + entries[i + 1]
    else
        redis.call('HDEL', KEYS[1], entries[i])
    end
end
return {sums.judged, sums.blocked}
"""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _UnsentCounts:
    """Verdicts of one version that are not in Redis yet."""

    policy: PolicyIdentity
    band: BlockRateBand
    counts: Counter[str] = field(default_factory=Counter)
    began_s: float = field(default_factory=time.monotonic)
    """The earliest time of a counted verdict."""


class _PendingTrip(NamedTuple):
    """A trip that is not in the policy bucket yet."""

    since: int
    """`Rollout.since` at the time of the trip."""
    why: str


class CircuitBreaker:
    """Counts the blocks of each version in all processes, and opens when their rate leaves the version's band.

    Use it as an async context manager. An open breaker is a change of the policy's roll-out: it is in the history and
    outlives every process. It closes when the version is activated, or made canary, again.
    """

    def __init__(self, policies: PolicyCache, registry: PolicyRegistry, redis_cache: PolicyRedisCache | None) -> None:
        self._policies = policies
        self._service = PolicyService(registry, redis_cache, policies=policies)
        self._redis_cache = redis_cache
        self._watched: dict[PolicyIdentity, _UnsentCounts] = {}
        self._pending_trips: dict[PolicyIdentity, _PendingTrip] = {}
        """Breakers that are open in this process and not in the policy bucket yet."""

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._check_loop())
        return self

    async def __aexit__(self, *_: object) -> None:
        await cancel_and_wait(self._task)

    def allows(self, policy: Policy, action: Action) -> bool:
        """Count one verdict, and return whether its action is allowed. Needs no network."""
        if policy.block_rate is None:
            return True
        watched = self._watched.get(policy.identity)
        if watched is None:
            watched = self._watched[policy.identity] = _UnsentCounts(policy.identity, policy.block_rate)
        if not watched.counts:
            watched.began_s = time.monotonic()
        watched.counts["judged"] += 1
        if action != "block":
            return True
        watched.counts["blocked"] += 1
        return policy.identity not in self._pending_trips and not self._policies.is_tripped(policy.identity)

    async def _check_loop(self) -> None:
        while True:
            await asyncio.sleep(_CHECK_INTERVAL_S)
            for watched in list(self._watched.values()):
                try:
                    await self._check(watched)
                except PolicyUnavailable as error:
                    log.warning("the circuit breaker cannot read or write the roll-out; retrying: %s", error)
                except Exception:
                    log.exception("checking the circuit breaker of %s failed; retrying", watched.policy.name)

    async def _check(self, watched: _UnsentCounts) -> None:
        policy, band = watched.policy, watched.band
        if not watched.counts and policy not in self._pending_trips:
            return
        rollout = await self._policies.rollout(policy.name)
        judged, blocked = await self._count(watched, rollout.since)
        trip = self._pending_trips.get(policy)
        if policy.version in rollout.tripped or (trip and trip.since != rollout.since):
            self._pending_trips.pop(policy, None)  # the trip is written, or the roll-out has changed since
            return
        if trip is None:
            rate = blocked / judged if judged else 0.0
            if judged < band.after or band.at_least <= rate <= band.at_most:
                return
            why = (
                f"blocked {blocked} of {judged} in {band.window_s:g} s ({rate:.1%}), "
                f"outside of {band.at_least:.1%} to {band.at_most:.1%}"
            )
            trip = self._pending_trips[policy] = _PendingTrip(rollout.since, why)
            telemetry.BREAKER_TRIPS.inc(1, {"policy": policy.name, "version": str(policy.version)})
            log.error(
                "CIRCUIT BREAKER: policy %s@%d %s; it blocks nothing until it is activated again; images that it would "
                "block go to review",
                policy.name,
                policy.version,
                why,
            )
        await self._write_trip(policy, trip)

    async def _write_trip(self, policy: PolicyIdentity, trip: _PendingTrip) -> None:
        try:
            await self._service.trip(policy.name, policy.version, since=trip.since, who=BREAKER, why=trip.why)
        except ConfigurationError as error:
            raise PolicyUnavailable(str(error)) from error
        self._pending_trips.pop(policy, None)

    async def _count(self, watched: _UnsentCounts, since: int) -> tuple[int, int]:
        """Verdicts and blocks of all processes in the window.

        While Redis is down it counts only this process, from the start of each window.
        """
        policy, band, now_s = watched.policy, watched.band, time.monotonic()
        if now_s - watched.began_s > band.window_s:
            watched.counts.clear()
            watched.began_s = now_s
        told = Counter(watched.counts)
        judged, blocked = told["judged"], told["blocked"]
        if self._redis_cache is None:
            return judged, blocked
        key = self._redis_cache.key("block-rate", f"{policy.name}@{policy.version}", str(since))
        try:
            judged, blocked = await self._redis_cache.run(
                _COUNT, [key], band.window_s / _WINDOW_SLICES, _WINDOW_SLICES, judged, blocked
            )
        except RedisUnavailable:
            return judged, blocked
        watched.counts -= told  # verdicts counted since then stay
        watched.began_s = now_s
        return int(judged), int(blocked)

"""The circuit breaker: a policy version whose block rate leaves its band stops blocking; its blocks become reviews.

This is not a breaker on calls to a backend.
"""

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
"""The author (`who`) of its changes in the history."""

_CHECK_INTERVAL_S: Final = 0.25
_WINDOW_SLICES: Final = 10
"""Number of slices of the sliding window."""

_COUNT: Final = """
local now = math.floor(redis.call('TIME')[1] / ARGV[1])
redis.call('HINCRBY', KEYS[1], now .. ':judged', ARGV[3])
redis.call('HINCRBY', KEYS[1], now .. ':blocked', ARGV[4])
redis.call('EXPIRE', KEYS[1], math.ceil(2 * ARGV[1] * ARGV[2]))
local sums = {judged = 0, blocked = 0}
local entries = redis.call('HGETALL', KEYS[1])
for i = 1, #entries, 2 do
    local slice, name = string.match(entries[i], '(%d+):(%a+)')
    if tonumber(slice) > now - ARGV[2] then
        sums[name] = sums[name] + entries[i + 1]
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

    since_change: int
    """`Rollout.since` at the time of the trip."""
    reason: str


class CircuitBreaker:
    """Counts the blocks of each version in all processes, and opens when their rate leaves the version's band.

    Use it as an async context manager. An open breaker is a change of the policy's rollout: it is in the history and
    outlives every process. It closes when the version is activated, or made canary, again.
    """

    def __init__(self, policies: PolicyCache, registry: PolicyRegistry, redis_cache: PolicyRedisCache | None) -> None:
        self._policies = policies
        self._service = PolicyService(registry, redis_cache, policies=policies)
        self._redis_cache = redis_cache
        self._unsent: dict[PolicyIdentity, _UnsentCounts] = {}
        self._pending_trips: dict[PolicyIdentity, _PendingTrip] = {}
        """Breakers that are open in this process and not in the policy bucket yet."""

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._check_loop())
        return self

    async def __aexit__(self, *_: object) -> None:
        await cancel_and_wait(self._task)

    def count_and_allow(self, policy: Policy, action: Action) -> bool:
        """Count one verdict. Return False if it must not block. Uses no network."""
        if policy.block_rate is None:
            return True
        unsent = self._unsent.get(policy.identity)
        if unsent is None:
            unsent = self._unsent[policy.identity] = _UnsentCounts(policy.identity, policy.block_rate)
        if not unsent.counts:
            unsent.began_s = time.monotonic()
        unsent.counts["judged"] += 1
        if action != "block":
            return True
        unsent.counts["blocked"] += 1
        return policy.identity not in self._pending_trips and not self._policies.is_tripped(policy.identity)

    async def _check_loop(self) -> None:
        while True:
            await asyncio.sleep(_CHECK_INTERVAL_S)
            for unsent in list(self._unsent.values()):
                try:
                    await self._check(unsent)
                except PolicyUnavailable as error:
                    log.warning(
                        "the circuit breaker cannot read or write the rollout; retrying in %g s: %s",
                        _CHECK_INTERVAL_S,
                        error,
                    )
                except Exception:
                    log.exception("checking the circuit breaker of %s failed; retrying", unsent.policy.name)

    async def _check(self, unsent: _UnsentCounts) -> None:
        policy, band = unsent.policy, unsent.band
        if not unsent.counts and policy not in self._pending_trips:
            return
        rollout = await self._policies.get_rollout(policy.name)
        judged, blocked = await self._count(unsent, rollout.since)
        trip = self._pending_trips.get(policy)
        if policy.version in rollout.tripped or (trip and trip.since_change != rollout.since):
            self._pending_trips.pop(policy, None)  # the trip is written, or the rollout has changed since
            return
        if trip is None:
            rate = blocked / judged if judged else 0.0
            if judged < band.after or band.at_least <= rate <= band.at_most:
                return
            reason = (
                f"blocked {blocked} of {judged} in {band.window_s:g} s ({rate:.1%}), "
                f"outside of {band.at_least:.1%} to {band.at_most:.1%}"
            )
            trip = self._pending_trips[policy] = _PendingTrip(rollout.since, reason)
            telemetry.BREAKER_TRIPS.inc(1, {"policy": policy.name, "version": str(policy.version)})
            log.error(
                "CIRCUIT BREAKER: policy %s@%d %s; its blocks become reviews. `sluice policy activate %s@%d` lets it "
                "block again, `sluice policy rollback %s` replaces it.",
                policy.name,
                policy.version,
                reason,
                policy.name,
                policy.version,
                policy.name,
            )
        await self._write_trip(policy, trip)

    async def _write_trip(self, policy: PolicyIdentity, trip: _PendingTrip) -> None:
        try:
            await self._service.trip(
                policy.name, policy.version, since_change=trip.since_change, who=BREAKER, why=trip.reason
            )
        except ConfigurationError as error:
            raise PolicyUnavailable(str(error)) from error
        self._pending_trips.pop(policy, None)

    async def _count(self, unsent: _UnsentCounts, since_change: int) -> tuple[int, int]:
        """Verdicts and blocks of all processes in the window.

        While Redis is down it counts only this process, from the start of each window.
        """
        policy, band, now_s = unsent.policy, unsent.band, time.monotonic()
        if now_s - unsent.began_s > band.window_s:
            unsent.counts.clear()
            unsent.began_s = now_s
        sent = Counter(unsent.counts)
        judged, blocked = sent["judged"], sent["blocked"]
        if self._redis_cache is None:
            return judged, blocked
        key = self._redis_cache.key("block-rate", f"{policy.name}@{policy.version}", str(since_change))
        try:
            judged, blocked = await self._redis_cache.run(
                _COUNT, [key], band.window_s / _WINDOW_SLICES, _WINDOW_SLICES, judged, blocked
            )
        except RedisUnavailable:
            return judged, blocked
        unsent.counts -= sent  # verdicts counted since then stay
        unsent.began_s = now_s
        # Someone else may have written to the counters: at least the verdicts of this process are certain.
        judged = max(int(judged), sent["judged"])
        return judged, min(max(int(blocked), sent["blocked"]), judged)

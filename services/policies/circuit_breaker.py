"""The circuit breaker: a policy version whose block rate leaves its band stops blocking; its blocks become reviews.

This is not a breaker on calls to a backend.
"""

import asyncio
import hashlib
import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain
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
_TENANT_GROUPS: Final = 64
"""Tenants are counted in so many groups, so that the number of names does not bound the memory in Redis."""
_OTHERS_PER_AFTER: Final = 4
"""The tenants other than one must agree to a trip once they have a quarter of the verdicts that `after` asks for."""

# Others may have written other fields; it drops them, and returns at most two counts for each group.
_COUNT: Final = """
local now = math.floor(redis.call('TIME')[1] / ARGV[1])
for i = 3, #ARGV, 2 do
    redis.call('HINCRBY', KEYS[1], now .. ':' .. ARGV[i], ARGV[i + 1])
end
redis.call('EXPIRE', KEYS[1], math.ceil(2 * ARGV[1] * ARGV[2]))
local sums = {}
local entries = redis.call('HGETALL', KEYS[1])
for i = 1, #entries, 2 do
    local slice, kind, group = string.match(entries[i], '^(%d+):(%a+)(:?%d?%d?)$')
    local age = slice and now - tonumber(slice)
    if age and age >= 0 and age < tonumber(ARGV[2]) and (kind == 'judged' or kind == 'blocked') then
        local name = kind .. group
        sums[name] = (sums[name] or 0) + (tonumber(entries[i + 1]) or 0)
    else
        redis.call('HDEL', KEYS[1], entries[i])
    end
end
local flat = {}
for name, sum in pairs(sums) do
    flat[#flat + 1] = name
    flat[#flat + 1] = sum
end
return flat
"""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _UnsentCounts:
    """Verdicts of one version that are not in Redis yet."""

    policy: PolicyIdentity
    band: BlockRateBand
    counts: Counter[str] = field(default_factory=Counter)
    """By `judged:<group of tenants>` and `blocked:<group of tenants>`."""
    began_s: float = field(default_factory=time.monotonic)
    """The earliest time of a counted verdict."""


class _PendingTrip(NamedTuple):
    """A trip that is not in the policy bucket yet."""

    since_change: int
    """`Rollout.since` at the time of the trip."""
    reason: str


def find_trip_reason(counts: Mapping[str, int], band: BlockRateBand) -> str | None:
    """Return why the counts of a window open a circuit breaker; None if they do not. Pure.

    No tenant opens it alone: the rate of the others must be outside the band, too, once they have enough verdicts.
    Until then there is nothing to compare with, and the rate of all counts. `counts` are by `judged:<group>` and
    `blocked:<group>`.
    """
    by_group: dict[str, Counter[str]] = {}
    for name, count in counts.items():
        kind, _, group = name.partition(":")  # processes of 0.1.0 count without a group
        by_group.setdefault(group, Counter())[kind] += count
    total: Counter[str] = sum(by_group.values(), Counter())
    if total["judged"] < band.after or not _is_outside(total, band):
        return None
    for of_group in by_group.values():
        others = total - of_group
        if others["judged"] * _OTHERS_PER_AFTER >= band.after and not _is_outside(others, band):
            return None
    return (
        f"blocked {total['blocked']} of {total['judged']} in {band.window_s:g} s "
        f"({total['blocked'] / total['judged']:.1%}), outside of {band.at_least:.1%} to {band.at_most:.1%}"
    )


def _clamp(counts: Mapping[str, int], sent: Mapping[str, int]) -> Mapping[str, int]:
    """Return `counts` with at least what this process `sent`, and no more blocks than verdicts.

    Someone else may have written to the counters in Redis; the verdicts of this process are certain.
    """
    groups = {name.partition(":")[1:] for name in chain(counts, sent)}
    clamped: dict[str, int] = {}
    for group in map("".join, groups):
        judged, blocked = (
            max(counts.get(name, 0), sent.get(name, 0)) for name in (f"judged{group}", f"blocked{group}")
        )
        clamped |= {f"judged{group}": judged, f"blocked{group}": min(blocked, judged)}
    return clamped


def _is_outside(counts: Counter[str], band: BlockRateBand) -> bool:
    return not band.at_least <= counts["blocked"] / counts["judged"] <= band.at_most


@lru_cache(maxsize=4096)
def _name_counts(tenant: str) -> tuple[str, str]:
    """The names of the counts of the verdicts and the blocks of a tenant's group."""
    digest = hashlib.blake2b(tenant.encode(errors="replace"), digest_size=8).digest()
    group = int.from_bytes(digest) % _TENANT_GROUPS
    return f"judged:{group}", f"blocked:{group}"


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

    def count_and_allow(self, policy: Policy, action: Action, tenant: str | None) -> bool:
        """Count one verdict for a tenant, unless it is None. Return False if it must not block. Uses no network."""
        if policy.block_rate is None:
            return True
        if tenant is not None:
            unsent = self._unsent.get(policy.identity)
            if unsent is None:
                unsent = self._unsent[policy.identity] = _UnsentCounts(policy.identity, policy.block_rate)
            if not unsent.counts:
                unsent.began_s = time.monotonic()
            judged, blocked = _name_counts(tenant)
            unsent.counts[judged] += 1
            if action == "block":
                unsent.counts[blocked] += 1
        if action != "block":
            return True
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
        counts = await self._count(unsent, rollout.since)
        trip = self._pending_trips.get(policy)
        if policy.version in rollout.tripped or (trip and trip.since_change != rollout.since):
            self._pending_trips.pop(policy, None)  # the trip is written, or the rollout has changed since
            return
        if trip is None:
            reason = find_trip_reason(counts, band)
            if reason is None:
                return
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

    async def _count(self, unsent: _UnsentCounts, since_change: int) -> Mapping[str, int]:
        """Verdicts and blocks of all processes in the window, by group of tenants.

        While Redis is down it counts only this process, from the start of each window.
        """
        policy, band, now_s = unsent.policy, unsent.band, time.monotonic()
        if now_s - unsent.began_s > band.window_s:
            unsent.counts.clear()
            unsent.began_s = now_s
        sent = Counter(unsent.counts)
        if self._redis_cache is None:
            return sent
        key = self._redis_cache.key("block-rate", f"{policy.name}@{policy.version}", str(since_change))
        try:
            arguments: chain[str | int] = chain.from_iterable(sent.items())
            flat = await self._redis_cache.run(
                _COUNT, [key], band.window_s / _WINDOW_SLICES, _WINDOW_SLICES, *arguments
            )
        except RedisUnavailable:
            return sent
        unsent.counts -= sent  # verdicts counted since then stay
        unsent.began_s = now_s
        return _clamp({name.decode(): int(count) for name, count in zip(flat[::2], flat[1::2], strict=True)}, sent)

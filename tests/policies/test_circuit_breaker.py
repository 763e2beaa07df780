"""The circuit breaker: it counts in all processes, opens once, and closes with an activation."""

import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from services.core.messages import Submission
from services.core.values import BlockRateBand, Policy
from services.policies.cache import PolicyCache
from services.policies.circuit_breaker import BREAKER, CircuitBreaker, find_trip_reason
from services.policies.document import PolicyDocument
from services.policies.redis_cache import PolicyRedisCache
from services.policies.registry import PolicyRegistry
from services.policies.rollout import Canary
from services.policies.service import PolicyService
from services.policies.tenants import TenantsDocument
from tests.support.policies import becomes, unreachable
from tests.support.redis_attacks import little_is_sent, run_on_server
from tests.support.servers import Valkey

GUARDED = PolicyDocument.model_validate(
    {"name": "default", "block_rate": {"at_least": 0, "at_most": 0.3, "window_s": 60, "after": 20}}
)


class Members:
    """Processes that judge by the same policies."""

    def __init__(self, registry: PolicyRegistry, url: str | None) -> None:
        self.registry = registry
        self.shared = PolicyRedisCache(url, registry.bucket) if url else None
        self._closing = AsyncExitStack()

    async def join(self) -> tuple[PolicyCache, CircuitBreaker]:
        cache = await self._closing.enter_async_context(PolicyCache(self.registry, self.shared, refresh_s=0.5))
        breaker = await self._closing.enter_async_context(CircuitBreaker(cache, self.registry, self.shared))
        return cache, breaker

    async def close(self) -> None:
        await self._closing.aclose()
        if self.shared:
            await self.shared.close()


async def policy(cache: PolicyCache, version: int = 1) -> Policy:
    choice = await cache.choose(Submission(id=uuid.uuid4().hex, uri="s3://a/b", policy=f"default@{version}"))
    return choice.policy


def judge(breaker: CircuitBreaker, by: Policy, *, blocked: int, of: int) -> list[bool]:
    return [breaker.count_and_allow(by, "block" if n < blocked else "allow", "default") for n in range(of)]


async def until(true: Callable[[], bool], within_s: float = 30) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def wait_for_counts(members: Members, judged: int, since: int) -> None:
    """Wait until the processes have counted so many verdicts of version 1 in Redis after the change `since`."""

    async def counted() -> int:
        assert members.shared is not None
        counts = await members.shared.client.hgetall(members.shared.key("block-rate", "default@1", str(since)))
        return sum(int(count) for name, count in counts.items() if b":judged:" in name)

    await becomes(judged, counted)


@pytest.fixture
async def members(registry: PolicyRegistry, valkey_url: str) -> AsyncIterator[Members]:
    registry.publish(GUARDED)
    registry.activate("default", 1, who="ann")
    members = Members(registry, valkey_url)
    yield members
    await members.close()


async def test_blocks_of_all_processes_trip_every_process(members: Members) -> None:
    joined = [await members.join() for _ in range(3)]
    by = [await policy(cache) for cache, _ in joined]
    for (_, breaker), p in zip(joined, by, strict=True):
        # Each alone has seen too little to know.
        assert all(judge(breaker, p, blocked=8, of=8))
    await until(lambda: all(cache.is_tripped(p.identity) for (cache, _), p in zip(joined, by, strict=True)))
    for (_, breaker), p in zip(joined, by, strict=True):
        assert judge(breaker, p, blocked=1, of=2) == [False, True]
    trips = [change for change in members.registry.list_changes("default") if change.action == "trip"]
    assert [(change.who, change.version) for change in trips] == [(BREAKER, 1)]
    assert "24 of 24" in trips[0].why


async def test_block_rate_inside_the_band_does_not_trip(members: Members) -> None:
    cache, breaker = await members.join()
    by = await policy(cache)
    for number in range(1, 6):
        assert all(judge(breaker, by, blocked=5, of=20))
        await wait_for_counts(members, 20 * number, since=1)
    assert all(judge(breaker, by, blocked=0, of=1))
    await wait_for_counts(members, 101, since=1)  # so the check of the counts before has ended
    assert not cache.is_tripped(by.identity)


async def test_open_breaker_is_known_to_a_new_process_and_closed_by_an_activation(members: Members) -> None:
    cache, breaker = await members.join()
    judge(breaker, by := await policy(cache), blocked=30, of=30)
    await until(lambda: cache.is_tripped(by.identity))
    later, its_breaker = await members.join()
    p = await policy(later)
    assert judge(its_breaker, p, blocked=1, of=1) == [False]
    await wait_for_counts(members, 31, since=1)
    activation = members.registry.activate("default", 1, who="ann", why="it is a raid, block it")
    cache.apply_change(activation)
    for number in (1, 2):  # when the second one is counted, the check of the first one has ended
        assert judge(breaker, by, blocked=1, of=1) == [True]
        await wait_for_counts(members, number, since=activation.number)
    assert not cache.is_tripped(by.identity), "verdicts before the activation must not count"


async def test_tripped_canary_ends(members: Members) -> None:
    members.registry.publish(GUARDED.model_copy(update={"description": "stricter"}))
    members.registry.set_canary("default", Canary(version=2, percent=50), who="ann")
    cache, breaker = await members.join()
    by = await policy(cache, 2)
    judge(breaker, by, blocked=30, of=30)
    await until(lambda: cache.is_tripped(by.identity))
    rollout = await cache.get_rollout("default")
    assert (rollout.canary, rollout.active) == (None, 1)
    assert judge(breaker, await policy(cache, 1), blocked=1, of=1) == [True], "the active version still blocks"


async def test_breaker_trips_while_redis_and_the_bucket_are_down(registry: PolicyRegistry, tmp_path: Path) -> None:
    registry.publish(GUARDED)
    registry.activate("default", 1, who="ann")
    valkey = Valkey(tmp_path)
    valkey.start()
    members = Members(registry, valkey.url)
    try:
        cache, breaker = await members.join()
        by = await policy(cache)
        valkey.kill()
        breaker._service = PolicyService(unreachable(), members.shared, policies=cache)
        judge(breaker, by, blocked=30, of=30)
        await until(lambda: not breaker.count_and_allow(by, "block", "default"))
        breaker._service = PolicyService(registry, members.shared, policies=cache)
        await until(lambda: cache.is_tripped(by.identity), within_s=30)
    finally:
        valkey.kill()
        await members.close()


@pytest.mark.parametrize("with_redis", [True, False])
async def test_verdicts_before_the_window_do_not_count(
    registry: PolicyRegistry, valkey_url: str, with_redis: bool
) -> None:
    band = {"at_least": 0, "at_most": 0.3, "window_s": 1, "after": 20}
    registry.publish(GUARDED.model_copy(update={"block_rate": GUARDED.block_rate.model_validate(band)}))
    registry.activate("default", 1, who="ann")
    members = Members(registry, valkey_url if with_redis else None)
    try:
        cache, breaker = await members.join()
        judge(breaker, by := await policy(cache), blocked=0, of=10_000)
        await asyncio.sleep(2.5)
        judge(breaker, by, blocked=500, of=500)
        await until(lambda: cache.is_tripped(by.identity))
    finally:
        await members.close()


async def test_unwritten_trip_is_written_later_unless_the_version_was_activated_again(members: Members) -> None:
    """The later verdicts are within the band."""
    cache, breaker = await members.join()
    by = await policy(cache)
    for decided in (False, True):
        breaker._service = PolicyService(unreachable(), members.shared, policies=cache)
        judge(breaker, by, blocked=30, of=30)
        await until(lambda: not breaker.count_and_allow(by, "block", "default"))
        judge(breaker, by, blocked=0, of=500)
        if decided:
            cache.apply_change(members.registry.activate("default", 1, who="ann", why="let it block"))
            await until(lambda: breaker.count_and_allow(by, "block", "default"))
        breaker._service = PolicyService(members.registry, members.shared, policies=cache)
        if not decided:
            await until(lambda: cache.is_tripped(by.identity), within_s=30)
            cache.apply_change(members.registry.activate("default", 1, who="ann"))
    actions = [change.action for change in members.registry.list_changes("default")]
    assert actions == ["activate", "trip", "activate", "activate"]


async def test_block_rate_below_the_band_trips(registry: PolicyRegistry) -> None:
    band = {"at_least": 0.1, "at_most": 1, "window_s": 60, "after": 20}
    registry.publish(PolicyDocument.model_validate({"name": "default", "block_rate": band}))
    registry.activate("default", 1, who="ann")
    members = Members(registry, None)
    cache, breaker = await members.join()
    judge(breaker, by := await policy(cache), blocked=0, of=30)
    await until(lambda: cache.is_tripped(by.identity))
    await members.close()


@pytest.mark.parametrize(("judged", "blocked"), [("-1000", "-1000"), ("-1000", "0"), ("0", "-1000"), ("x", "y")])
async def test_forged_counts_do_not_hide_the_verdicts_of_a_process(
    registry: PolicyRegistry, valkey_url: str, judged: str, blocked: str
) -> None:
    registry.publish(GUARDED)
    change = registry.activate("default", 1, who="ann")
    members = Members(registry, valkey_url)
    assert members.shared
    cache, breaker = await members.join()
    by = await policy(cache)
    seconds, _ = await members.shared.client.time()
    forged = {}
    for number, group in itertools.product(range(-1, 11), range(64)):
        counter = f"{seconds // 6 + number}:{{}}:{group}"
        forged |= {counter.format("judged"): judged, counter.format("blocked"): blocked}
    key = members.shared.key("block-rate", "default@1", str(change.rollout.since))
    await members.shared.client.hset(key, mapping=forged)
    judge(breaker, by, blocked=40, of=40)
    await until(lambda: cache.is_tripped(by.identity), within_s=15)
    await members.close()


BAND = BlockRateBand(at_least=0.0, at_most=0.3, window_s=60, after=20)


def test_one_tenant_alone_opens_no_shared_breaker() -> None:
    flood = {"judged:1": 10_000, "blocked:1": 10_000}
    assert find_trip_reason(flood | {"judged:2": 5, "blocked:2": 1}, BAND) is None
    assert find_trip_reason(flood | {"judged:2": 5, "blocked:2": 2}, BAND)
    assert find_trip_reason(flood, BAND), "there is no other tenant to compare with"
    assert find_trip_reason(flood | {"judged:2": 4, "blocked:2": 0}, BAND), "too few to compare with"


def test_one_tenant_alone_opens_no_breaker_by_safe_images() -> None:
    at_least = BlockRateBand(at_least=0.1, at_most=1.0, window_s=60, after=20)
    flood = {"judged:1": 10_000, "judged:2": 100, "blocked:2": 20}
    assert find_trip_reason(flood, at_least) is None
    assert find_trip_reason(flood | {"blocked:2": 5}, at_least)


def test_counts_without_group_of_processes_of_0_1_0_are_one_group() -> None:
    old = {"judged": 100, "blocked": 90}
    assert find_trip_reason(old | {"judged:1": 100, "blocked:1": 90}, BAND)
    assert find_trip_reason(old | {"judged:1": 100, "blocked:1": 9}, BAND) is None


async def test_verdict_without_a_counted_tenant_is_not_counted(members: Members) -> None:
    cache, breaker = await members.join()
    by = await policy(cache)
    for _ in range(200):
        assert breaker.count_and_allow(by, "block", None)
    judge(breaker, by, blocked=0, of=20)
    await wait_for_counts(members, 20, since=1)
    judge(breaker, by, blocked=0, of=1)
    await wait_for_counts(members, 21, since=1)  # so the check of the counts before has ended
    assert not cache.is_tripped(by.identity)


async def test_only_own_tenants_without_a_pinned_version_are_counted(registry: PolicyRegistry) -> None:
    shop = PolicyDocument.model_validate({"name": "shop", "block_rate": {"at_most": 0.3}})
    for document in (GUARDED, shop):
        registry.publish(document)
        registry.activate(document.name, 1, who="ann")

    async def counted(cache: PolicyCache, tenant: str, name: str) -> str | None:
        request = Submission(id="a", uri="s3://a/b", tenant=tenant, policy=name)
        return (await cache.choose(request)).counted_tenant

    async with PolicyCache(registry, None) as cache:
        assert await counted(cache, "default", "shop") == "default", "it owns all policies while there are no tenants"
        assert await counted(cache, "other", "default") == "other"
        assert await counted(cache, "other", "shop") is None
    registry.publish(TenantsDocument(tenants={"b": "shop"}))
    registry.activate("tenants", 1, who="ann")
    async with PolicyCache(registry, None) as cache:
        assert [await counted(cache, "b", name) for name in ("default", "shop", "shop@1")] == ["b", "b", None]
        assert [await counted(cache, "other", name) for name in ("default", "shop", "shop@1")] == ["other", None, None]
        assert [await counted(cache, "default", name) for name in ("default", "shop")] == ["default", None]


async def test_invented_counts_are_not_read_and_true_ones_still_open_the_breaker(members: Members) -> None:
    assert members.shared is not None
    client, key = members.shared.client, members.shared.key("block-rate", "default@1", "1")
    window = (await client.time())[0] // 6
    invent = (
        "local long = string.sub(huge, 1, 2000) "
        "for n = 1, 1500 do redis.call('HSET', KEYS[1], KEYS[2] .. ':' .. string.rep('a', n), n) end "
        "redis.call('HSET', KEYS[1], KEYS[2] .. ':judged:' .. long, 1, KEYS[2] .. ':judged', long, "
        "KEYS[2] .. ':blocked:1', 'garbage', 99999999999 .. ':judged:1', 1000000)"
    )
    async with little_is_sent(client):
        await run_on_server(client, invent, key, str(window))
        _, breaker = joined = await members.join()
        judge(breaker, by := await policy(joined[0]), blocked=30, of=30)
        await until(lambda: joined[0].is_tripped(by.identity))
    assert await client.hlen(key) < 10  # type: ignore[misc]

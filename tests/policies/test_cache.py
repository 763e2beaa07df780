"""Which version a submission gets, from the local copies, Redis and the bucket, whichever of them is there."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import pytest

from services.core.errors import PolicyUnavailable, RedisUnavailable, UnknownPolicy
from services.core.messages import Submission
from services.policies import cache as policy_cache
from services.policies import redis_cache
from services.policies.cache import PolicyCache
from services.policies.document import BUILT_IN, PolicyDocument
from services.policies.redis_cache import PolicyRedisCache
from services.policies.registry import PolicyRegistry, StoredVersion
from services.policies.rollout import Canary, Shadow
from services.policies.tenants import TenantsDocument
from tests.support.policies import SIGNING_KEY, CountingRegistry, becomes, unreachable, wait_for_listeners
from tests.support.servers import Valkey

WAIVED = PolicyDocument.model_validate({"name": "default", "categories": {"O9": "waive"}})


def submission(policy: str = "default", id_: str = "upl-1", tenant: str = "default") -> Submission:
    return Submission(id=id_, uri="s3://uploads/a", policy=policy, tenant=tenant)


async def version_of(cache: PolicyCache, *args: str, **kwargs: str) -> int:
    return (await cache.choose(submission(*args, **kwargs))).policy.identity.version


@contextmanager
def running_valkey(folder: Path) -> Iterator[Valkey]:
    valkey = Valkey(folder)
    valkey.start()
    try:
        yield valkey
    finally:
        valkey.kill()


@pytest.fixture
def filled(registry: PolicyRegistry) -> PolicyRegistry:
    registry.publish_built_in()
    registry.publish(WAIVED)
    return registry


@pytest.fixture
async def shared(valkey_url: str) -> AsyncIterator[PolicyRedisCache]:
    copies = PolicyRedisCache(valkey_url, uuid.uuid4().hex, signing_key=SIGNING_KEY)
    yield copies
    await copies.close()


async def test_reference_by_name_or_version_finds_the_policy(filled: PolicyRegistry, shared: PolicyRedisCache) -> None:
    async with PolicyCache(filled, shared) as cache:
        assert await version_of(cache) == 1
        assert (await cache.choose(submission("default@2"))).policy.identity.digest == WAIVED.digest()
        assert (await cache.resolve("default")).identity.version == 1
        assert (await cache.resolve("default@2")).identity.version == 2


@pytest.mark.parametrize(
    "reference",
    [
        "",
        "absent",
        "default@9",
        "default@0",
        "default@",
        "default@x",
        "default@-1",
        "../default",
        "D",
        "a@1@2",
        "tenants",
    ],
)
async def test_unknown_reference_is_rejected(filled: PolicyRegistry, shared: PolicyRedisCache, reference: str) -> None:
    async with PolicyCache(filled, shared) as cache:
        with pytest.raises(UnknownPolicy):
            await cache.choose(submission(reference))


async def test_unknown_policy_is_read_once_a_second(filled: PolicyRegistry, shared: PolicyRedisCache) -> None:
    counting = CountingRegistry(filled)
    async with PolicyCache(counting, shared) as cache:
        for _ in range(50):
            for reference in ("absent", "default@9"):
                with pytest.raises(UnknownPolicy):
                    await cache.choose(submission(reference))
    assert counting.reads["absent"] == counting.reads["default@9"] == 1


async def test_known_policy_needs_no_read(filled: PolicyRegistry, shared: PolicyRedisCache) -> None:
    counting = CountingRegistry(filled)
    async with PolicyCache(counting, shared, refresh_s=60) as cache:
        await cache.choose(submission())
        before = counting.reads.copy()
        for n in range(1000):
            await cache.choose(submission(id_=f"upl-{n}"))
        assert counting.reads == before


async def test_announced_change_reaches_every_process(filled: PolicyRegistry, shared: PolicyRedisCache) -> None:
    async with AsyncExitStack() as stack:
        caches = [await stack.enter_async_context(PolicyCache(filled, shared, refresh_s=60)) for _ in range(4)]
        assert [await version_of(cache) for cache in caches] == [1] * 4
        await wait_for_listeners(shared, 4)
        await shared.publish_change("default", filled.activate("default", 2, who="ann"))
        await becomes([2] * 4, lambda: asyncio.gather(*map(version_of, caches)))


async def test_older_announcement_is_ignored(filled: PolicyRegistry, shared: PolicyRedisCache) -> None:
    async with PolicyCache(filled, shared, refresh_s=60) as cache:
        await cache.choose(submission())
        older, newer = filled.activate("default", 2, who="ann"), filled.activate("default", 1, who="ann")
        cache.apply_change(newer)
        cache.apply_change(older)
        assert await version_of(cache) == 1
        await shared.publish_change("default", newer)
        await shared.publish_change("default", older)
        known = await shared.find_newest_change("default")
        assert known is not None
        assert known.change == newer


async def test_change_without_redis_is_found_by_the_refresh(filled: PolicyRegistry) -> None:
    async with PolicyCache(filled, None, refresh_s=0.2) as cache:
        assert await version_of(cache) == 1
        filled.activate("default", 2, who="ann")
        await becomes(2, lambda: version_of(cache))


async def test_unannounced_change_is_found_by_the_refresh(filled: PolicyRegistry, shared: PolicyRedisCache) -> None:
    async with PolicyCache(filled, shared, refresh_s=1) as cache:
        assert await version_of(cache) == 1
        filled.activate("default", 2, who="ann")
        await becomes(2, lambda: version_of(cache))


async def test_signed_copy_is_used_while_the_bucket_is_down(
    filled: PolicyRegistry, shared: PolicyRedisCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with PolicyCache(filled, shared) as cache:
        await cache.choose(submission())
    now_s = time.time()
    monkeypatch.setattr(redis_cache.time, "time", lambda: now_s + 3600)  # the copies are an hour old
    async with PolicyCache(unreachable(), shared, refresh_s=1) as later:
        assert await version_of(later) == 1
        with pytest.raises(PolicyUnavailable):
            await later.choose(submission("default@2"))


async def test_bucket_is_used_while_redis_is_down_and_local_copies_while_both_are(
    filled: PolicyRegistry, tmp_path: Path
) -> None:
    with running_valkey(tmp_path) as valkey:
        shared = PolicyRedisCache(valkey.url, "policies")
        async with PolicyCache(filled, shared, refresh_s=0.3) as cache:
            assert await version_of(cache) == 1
            valkey.kill()
            filled.activate("default", 2, who="ann")
            await becomes(2, lambda: version_of(cache))
            broken = CountingRegistry(unreachable())
            cache._registry = broken

            async def refreshed_twice() -> bool:
                return broken.reads["default"] >= 2

            await becomes(True, refreshed_twice)
            assert await version_of(cache) == 2
            with pytest.raises(PolicyUnavailable):
                await cache.choose(submission("default@3"))
        async with PolicyCache(unreachable(), shared, refresh_s=0.3) as cold:
            with pytest.raises(PolicyUnavailable):
                await cold.choose(submission())
        await shared.close()


async def test_changes_are_received_after_a_restart_of_redis(
    filled: PolicyRegistry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running_valkey(tmp_path) as valkey:
        shared = PolicyRedisCache(valkey.url, "policies")
        async with PolicyCache(filled, shared, refresh_s=60) as cache:
            assert await version_of(cache) == 1
            valkey.kill()
            filled.activate("default", 2, who="ann")

            async def outage_noticed() -> bool:
                return "Redis is down" in caplog.text

            await becomes(True, outage_noticed)
            valkey.start()
            await becomes(2, lambda: version_of(cache))
            await wait_for_listeners(shared, 1)
            change = filled.activate("default", 1, who="ann")
            await shared.publish_change("default", change)
            await becomes(1, lambda: version_of(cache))
        await shared.close()


@pytest.mark.parametrize("poison", [b"{}", b"garbage", b'{"digest": "sha256:0", "document": {"name": "default"}}'])
async def test_invalid_copy_is_replaced_from_the_bucket(
    filled: PolicyRegistry, shared: PolicyRedisCache, poison: bytes
) -> None:
    await shared.client.set(shared.key("version", "default@1"), poison)
    await shared.client.hset(shared.key("rollout", "default"), mapping={"number": 1, "change": poison, "checked_ms": 0})
    async with PolicyCache(filled, shared) as cache:
        assert (await cache.choose(submission())).policy.identity.digest == BUILT_IN.digest()
    kept = await shared.find_version("default", 1)
    assert kept is not None
    assert kept.stored.digest == BUILT_IN.digest()


async def test_copy_with_another_digest_is_replaced_from_the_bucket(
    filled: PolicyRegistry, shared: PolicyRedisCache
) -> None:
    """The bucket was made anew: the copies are of versions of the same name and number."""
    other = PolicyDocument(name="default", description="of the old bucket")
    await shared.cache_version(StoredVersion("default", 1, other.digest(), other))
    async with PolicyCache(filled, shared) as cache:
        assert (await cache.choose(submission())).policy.identity.digest == BUILT_IN.digest()


async def test_processes_that_start_at_once_read_the_bucket_once(
    filled: PolicyRegistry, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A slow machine is no reason to read again: no copy gets old, no lease ends and no answer is late in this test.
    monkeypatch.setattr(redis_cache, "_LEASE_MS", 60_000)
    monkeypatch.setattr(policy_cache, "_LEASE_WAIT_S", 60.0)
    counting, bucket = CountingRegistry(filled, pause_s=0.2), uuid.uuid4().hex
    copies = [PolicyRedisCache(valkey_url, bucket, signing_key=SIGNING_KEY, timeout_s=60) for _ in range(64)]
    async with AsyncExitStack() as stack:
        caches = [await stack.enter_async_context(PolicyCache(counting, shared, refresh_s=60)) for shared in copies]
        assert set(await asyncio.gather(*(version_of(cache) for cache in caches))) == {1}
    assert counting.reads == {"default@1": 1, "default": 1, "tenants": 1}
    for shared in copies:
        await shared.close()


async def test_process_that_gets_the_lease_late_takes_the_copy(
    filled: PolicyRegistry, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its look for a copy and its lease, another process reads the bucket and releases the lease."""
    counting, bucket = CountingRegistry(filled), uuid.uuid4().hex
    slow, quick = (PolicyRedisCache(valkey_url, bucket, signing_key=SIGNING_KEY) for _ in range(2))
    lease = slow.lease
    overtaken: set[str] = set()

    async def lease_late(what: str) -> str | None:
        if what not in overtaken:
            overtaken.add(what)
            async with PolicyCache(counting, quick, refresh_s=60) as quicker:
                await quicker.choose(submission())
        return await lease(what)

    monkeypatch.setattr(slow, "lease", lease_late)
    async with PolicyCache(counting, slow, refresh_s=60) as cache:
        assert await version_of(cache) == 1
    assert overtaken
    assert counting.reads == {"default@1": 1, "default": 1, "tenants": 1}
    await slow.close()
    await quick.close()


async def test_canary_and_shadow_are_chosen_by_tenant_and_share(
    filled: PolicyRegistry, shared: PolicyRedisCache
) -> None:
    filled.set_canary("default", Canary(version=2, percent=50, tenants=frozenset({"acme"})), who="ann")
    filled.set_shadow("default", Shadow(version=2, percent=100), who="ann")
    async with PolicyCache(filled, shared) as cache:
        assert await version_of(cache, tenant="acme") == 2
        assert await version_of(cache, "default@1", tenant="acme") == 1, "who names a version gets that one"
        for n in range(100):
            choice = await cache.choose(submission(id_=f"upl-{n}"))
            version, shadow = choice.policy.identity.version, choice.shadow
            assert (shadow.identity.version if shadow else None) == (2 if version == 1 else None)


async def test_tenant_gets_its_policy(filled: PolicyRegistry, shared: PolicyRedisCache) -> None:
    filled.publish(PolicyDocument(name="shop"))
    filled.activate("shop", 1, who="ann")
    async with PolicyCache(filled, shared, refresh_s=60) as cache:
        await cache.choose(submission(tenant="acme"))
        filled.publish(TenantsDocument.model_validate({"kind": "tenants", "tenants": {"acme": "shop"}}))
        cache.apply_change(filled.activate("tenants", 1, who="ann"))
        for tenant, policy in {"acme": "shop", "default": "default", "nobody": "default"}.items():
            assert (await cache.choose(submission(tenant=tenant))).policy.identity.name == policy
        named = await cache.choose(submission("default@2", tenant="acme"))
        assert (named.policy.identity.name, named.policy.identity.version) == ("default", 2)


async def test_concurrent_changes_during_restarts_of_redis_are_all_kept(
    registry: PolicyRegistry, tmp_path: Path
) -> None:
    """32 people publish and activate at once; Redis dies and comes back meanwhile."""
    registry.publish_built_in()
    with running_valkey(tmp_path) as valkey:
        shared = PolicyRedisCache(valkey.url, registry.bucket)

        async def change(number: int) -> int:
            stored = await asyncio.to_thread(registry.publish, WAIVED)
            for done in (
                await asyncio.to_thread(registry.activate, "default", stored.version, who=f"w{number}"),
                await asyncio.to_thread(registry.activate, "default", 1, who=f"w{number}"),
            ):
                with suppress(RedisUnavailable):
                    await shared.publish_change("default", done)
            return stored.version

        async def shake() -> None:
            for _ in range(3):
                await asyncio.sleep(0.3)
                await asyncio.to_thread(valkey.kill)
                await asyncio.sleep(0.3)
                await asyncio.to_thread(valkey.start)

        async with PolicyCache(registry, shared, refresh_s=1) as cache:
            await cache.choose(submission())
            shaking = asyncio.create_task(shake())
            versions = await asyncio.gather(*(change(number) for number in range(32)))
            await shaking
            assert sorted(versions) == list(range(2, 34))
            history = registry.list_changes("default")
            assert [entry.number for entry in history] == list(range(1, 66))
            assert all(after.previous == before.version for before, after in pairwise(history))
            await becomes(history[-1].version, lambda: version_of(cache), within_s=10)
        await shared.close()

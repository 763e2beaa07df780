"""The policy service: each change is written and announced, and is effective even if the announcement fails."""

import uuid

import pytest

from services.core.errors import UnknownPolicy
from services.core.messages import Submission
from services.policies.cache import PolicyCache
from services.policies.document import PolicyDocument
from services.policies.redis_cache import PolicyRedisCache
from services.policies.registry import PolicyRegistry
from services.policies.rollout import Canary
from services.policies.service import PolicyService
from tests.support.policies import becomes, wait_for_listeners

DOCUMENT = PolicyDocument(name="default")


async def version_of(cache: PolicyCache, tenant: str = "t") -> int:
    choice = await cache.choose(Submission(id=uuid.uuid4().hex, uri="s3://a/b", policy="default", tenant=tenant))
    return choice.policy.identity.version


async def test_change_reaches_another_process_before_its_refresh(registry: PolicyRegistry, valkey_url: str) -> None:
    redis_cache = PolicyRedisCache(valkey_url, registry.bucket)
    service = PolicyService(registry, redis_cache)
    for _ in range(2):
        await service.publish(DOCUMENT)
    await service.activate("default", 1, who="ann")
    async with PolicyCache(registry, PolicyRedisCache(valkey_url, registry.bucket), refresh_s=600) as other:
        assert await version_of(other) == 1
        await wait_for_listeners(redis_cache, 1)
        await service.set_canary("default", Canary(version=2, percent=0, tenants=frozenset({"beta"})), who="ann")
        await becomes(2, lambda: version_of(other, "beta"))
        assert await version_of(other) == 1
    stored = await redis_cache.find_version("default", 2)
    assert stored is not None
    assert stored.stored.digest == DOCUMENT.digest()
    await redis_cache.close()


async def test_change_without_redis_stands_and_is_reported(registry: PolicyRegistry) -> None:
    warnings: list[str] = []
    away = PolicyRedisCache("redis://127.0.0.1:1/0", registry.bucket)
    service = PolicyService(registry, away, refresh_s=5, warn=warnings.append)
    await service.publish(DOCUMENT)
    change = await service.activate("default", 1, who="ann", why="first")
    assert registry.find_newest_change("default") == change
    assert len(warnings) == 2
    assert all("within 5 s" in warning for warning in warnings)


async def test_change_is_known_at_once_in_its_own_process(registry: PolicyRegistry) -> None:
    async with PolicyCache(registry, None, refresh_s=600) as cache:
        service = PolicyService(registry, None, policies=cache)
        for version in (1, 2):
            await service.publish(DOCUMENT)
            await service.activate("default", version, who="ann")
            assert await version_of(cache) == version
        assert (await service.rollback("default", who="ann")).version == 1
        assert await version_of(cache) == 1


async def test_rejected_change_is_not_announced(registry: PolicyRegistry) -> None:
    warnings: list[str] = []
    away = PolicyRedisCache("redis://127.0.0.1:1/0", registry.bucket)
    with pytest.raises(UnknownPolicy):
        await PolicyService(registry, away, warn=warnings.append).activate("default", 1, who="ann")
    assert warnings == []

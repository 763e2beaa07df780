"""Versions: immutable, consecutive, found again."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import boto3
import pytest
from botocore.config import Config

from services.errors import ConfigurationError, PolicyUnavailable, UnknownPolicy
from services.policies.cache import PolicyCache
from services.policies.policy import BUILT_IN, PolicyDocument
from services.policies.registry import PolicyRegistry

WAIVED = PolicyDocument.model_validate({"name": "default", "categories": {"O9": "waive"}})


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_publish_gives_the_next_version_and_keeps_the_others(registry: PolicyRegistry) -> None:
    assert [registry.publish(document) for document in (BUILT_IN, WAIVED, BUILT_IN)] == [1, 2, 3]
    assert registry.get("default", 2) == WAIVED
    assert registry.get("default", 1).digest() == registry.get("default", 3).digest() != WAIVED.digest()


def test_concurrent_publishers_get_different_versions(registry: PolicyRegistry) -> None:
    with ThreadPoolExecutor(8) as publishers:
        versions = list(publishers.map(lambda _: registry.publish(WAIVED), range(16)))
    assert sorted(versions) == list(range(1, 17))


def test_the_newest_activation_counts(registry: PolicyRegistry) -> None:
    registry.publish(BUILT_IN)
    registry.publish(WAIVED)
    with pytest.raises(UnknownPolicy, match="no active version"):
        registry.active("default")
    registry.activate("default", 2, who="ann", why="floods are news")
    back = registry.activate("default", 1, who="bob")
    assert (back.number, back.previous, back.version, back.who) == (2, 2, 1, "bob")
    assert registry.active("default") == 1
    with pytest.raises(UnknownPolicy):
        registry.activate("default", 3, who="ann")


def test_the_built_in_policy_is_published_once_and_never_over_another(registry: PolicyRegistry) -> None:
    with ThreadPoolExecutor(4) as starting:
        list(starting.map(lambda _: registry.publish_built_in(), range(4)))
    assert registry.active("default") == 1
    with pytest.raises(UnknownPolicy):
        registry.get("default", 2)
    registry.publish(WAIVED)
    registry.activate("default", 2, who="ann")
    registry.publish_built_in()
    assert registry.active("default") == 2


def test_a_bucket_that_is_not_there_is_the_users_to_mend(s3_endpoint: str) -> None:
    registry = PolicyRegistry(boto3.client("s3", endpoint_url=s3_endpoint), "no-such-bucket")
    with pytest.raises(ConfigurationError, match="SLUICE_POLICY_BUCKET"):
        registry.publish_built_in()


async def test_resolve_by_name_and_by_version(registry: PolicyRegistry) -> None:
    registry.publish_built_in()
    registry.publish(WAIVED)
    clock = Clock()
    policies = PolicyCache(registry, refresh_s=1, clock=clock)
    assert (await policies.resolve("default")).identity.version == 1
    assert (await policies.resolve("default@2")).identity.digest == WAIVED.digest()
    registry.activate("default", 2, who="ann")
    assert (await policies.resolve("default")).identity.version == 1, "within the refresh the local copy serves"
    clock.now += 1
    assert (await policies.resolve("default")).identity.version == 2


@pytest.mark.parametrize(
    "reference",
    ["", "absent", "default@9", "default@0", "default@", "default@x", "default@-1", "../default", "D", "a@1@2"],
)
async def test_unknown_policies(registry: PolicyRegistry, reference: str) -> None:
    registry.publish_built_in()
    with pytest.raises(UnknownPolicy):
        await PolicyCache(registry).resolve(reference)


async def test_the_last_known_version_serves_while_the_bucket_is_away(registry: PolicyRegistry) -> None:
    registry.publish_built_in()
    clock = Clock()
    policies = PolicyCache(registry, refresh_s=1, clock=clock)
    known = await policies.resolve("default")
    away = PolicyCache(unreachable(), refresh_s=1, clock=clock)
    with pytest.raises(PolicyUnavailable):
        await away.resolve("default")
    policies._registry = unreachable()
    clock.now += 60
    assert await policies.resolve("default") is known
    with pytest.raises(PolicyUnavailable):
        await policies.resolve("default@2")


async def test_look_ups_of_the_same_thing_are_one_request(registry: PolicyRegistry) -> None:
    registry.publish_built_in()
    asked: list[str] = []

    class Counting(PolicyRegistry):
        def active(self, name: str) -> int:
            asked.append(name)
            return registry.active(name)

        def get(self, name: str, version: int) -> PolicyDocument:
            asked.append(f"{name}@{version}")
            return registry.get(name, version)

    policies = PolicyCache(Counting(None, ""))  # type: ignore[arg-type]
    await asyncio.gather(*(policies.resolve("default") for _ in range(64)))
    assert asked == ["default", "default@1"]


def unreachable() -> PolicyRegistry:
    config = Config(connect_timeout=0.2, retries={"max_attempts": 0})
    return PolicyRegistry(boto3.client("s3", endpoint_url="http://127.0.0.1:9", config=config), "policies")

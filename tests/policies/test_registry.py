"""Versions and the history of their rollout: immutable, consecutive, found again."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import boto3
import pytest

from services.core.errors import ConfigurationError, PolicyUnavailable, UnknownPolicy
from services.policies.document import BUILT_IN, PolicyDocument
from services.policies.registry import PolicyRegistry
from services.policies.rollout import Canary, Rollout, Shadow
from services.policies.tenants import TenantsDocument

WAIVED = PolicyDocument.model_validate({"name": "default", "categories": {"O9": "waive"}})


def rollout(registry: PolicyRegistry, name: str = "default") -> Rollout:
    change = registry.find_newest_change(name)
    assert change is not None
    return change.rollout


def test_publish_creates_the_next_version_and_keeps_the_others(registry: PolicyRegistry) -> None:
    published = [registry.publish(document) for document in (BUILT_IN, WAIVED, BUILT_IN)]
    assert [stored.version for stored in published] == [1, 2, 3] == registry.list_versions("default")
    assert registry.get("default", 2).document == WAIVED
    assert published[0].digest == registry.get("default", 3).digest != WAIVED.digest()
    assert registry.list_names() == ["default"]
    assert registry.find_newest_change("default") is None, "published is not active"


def test_concurrent_changes_leave_one_consistent_history(registry: PolicyRegistry) -> None:
    registry.publish(BUILT_IN)

    def work(number: int) -> int:
        version = registry.publish(WAIVED).version
        registry.activate("default", version, who=f"w{number}")
        if number % 4 == 0:
            registry.rollback("default", who=f"w{number}") if rollout(registry).earlier else None
        return version

    with ThreadPoolExecutor(8) as workers:
        versions = list(workers.map(work, range(16)))
    assert sorted(versions) == list(range(2, 18))
    history = registry.list_changes("default")
    assert [change.number for change in history] == list(range(1, len(history) + 1))
    assert all(after.previous == before.version for before, after in pairwise(history))
    assert history[-1].version == rollout(registry).active


def test_newest_change_has_the_present_rollout(registry: PolicyRegistry) -> None:
    registry.publish(BUILT_IN)
    registry.publish(WAIVED)
    registry.activate("default", 2, who="ann", why="floods are news")
    back = registry.activate("default", 1, who="bob")
    assert (back.number, back.previous, back.version, back.who) == (2, 2, 1, "bob")
    assert rollout(registry).active == 1
    assert rollout(registry).digests == {1: BUILT_IN.digest()}
    rolled = registry.rollback("default", who="ann")
    assert (rolled.action, rolled.previous, rolled.version) == ("rollback", 1, 2)
    with pytest.raises(ConfigurationError, match="policy default: there is no earlier"):
        registry.rollback("default", who="ann")
    assert [(c.action, c.who) for c in registry.list_changes("default")] == [
        ("activate", "ann"),
        ("activate", "bob"),
        ("rollback", "ann"),
    ]


def test_canary_and_shadow_keep_the_active_version(registry: PolicyRegistry) -> None:
    for document in (BUILT_IN, WAIVED, WAIVED):
        registry.publish(document)
    registry.activate("default", 1, who="ann")
    registry.set_canary("default", Canary(version=2, percent=10), who="ann")
    change = registry.set_shadow("default", Shadow(version=3, percent=100), who="ann")
    assert (change.rollout.active, change.rollout.in_use, change.rollout.since) == (1, {1, 2, 3}, 2)
    assert change.rollout.digests.keys() == {1, 2, 3}
    ended = registry.set_canary("default", None, who="ann")
    assert (ended.previous, ended.version, ended.rollout.canary) == (2, None, None)


def test_trip_is_written_once_and_only_for_the_same_rollout(registry: PolicyRegistry) -> None:
    registry.publish(BUILT_IN)
    since = registry.activate("default", 1, who="ann").rollout.since
    with ThreadPoolExecutor(8) as members:
        trips = list(
            members.map(lambda _: registry.trip("default", 1, since_change=since, who="b", why="40 %"), range(8))
        )
    assert {change.number for change in trips} == {2}
    registry.activate("default", 1, who="ann", why="meant so")
    assert registry.trip("default", 1, since_change=since, who="b", why="old counts").action == "activate"
    assert rollout(registry).tripped == frozenset()


@pytest.mark.parametrize(
    "act",
    [
        lambda r: r.get("default", 9),
        lambda r: r.get("absent", 1),
        lambda r: r.get("default", 0),
        lambda r: r.get("default", 10**9),
        lambda r: r.get("../secrets", 1),
        lambda r: r.activate("default", 9, who="ann"),
        lambda r: r.set_canary("default", Canary(version=9, percent=1), who="ann"),
        lambda r: r.list_changes("absent"),
        lambda r: r.list_changes("a/b"),
    ],
)
def test_missing_policy_or_version_is_unknown(registry: PolicyRegistry, act: Any) -> None:
    registry.publish(BUILT_IN)
    with pytest.raises(UnknownPolicy):
        act(registry)


def test_tenants_document_with_an_inactive_policy_is_rejected(registry: PolicyRegistry) -> None:
    registry.publish(TenantsDocument.model_validate({"kind": "tenants", "tenants": {"acme": "shop"}}))
    with pytest.raises(ConfigurationError, match="'shop', which has no active version"):
        registry.activate("tenants", 1, who="ann")
    registry.publish(PolicyDocument(name="shop"))
    registry.activate("shop", 1, who="ann")
    assert registry.activate("tenants", 1, who="ann").rollout.active == 1


def test_damaged_version_is_unavailable(registry: PolicyRegistry) -> None:
    registry.publish(BUILT_IN)
    key = "policies/default/versions/99999998.json"
    body = registry.objects.read(key)
    registry.objects.put(key, body.replace(b'"full"', b'"adaptive"'))
    with pytest.raises(PolicyUnavailable, match="does not match its digest"):
        registry.get("default", 1)


def test_built_in_policy_is_published_only_into_an_empty_bucket(registry: PolicyRegistry) -> None:
    with ThreadPoolExecutor(4) as starting:
        list(starting.map(lambda _: registry.publish_built_in(), range(4)))
    assert rollout(registry).active == 1
    assert registry.list_versions("default") == [1]
    registry.publish(WAIVED)
    registry.activate("default", 2, who="ann")
    registry.publish_built_in()
    assert rollout(registry).active == 2


def test_missing_bucket_is_a_configuration_error(s3_endpoint: str) -> None:
    registry = PolicyRegistry(boto3.client("s3", endpoint_url=s3_endpoint), "no-such-bucket")
    with pytest.raises(ConfigurationError, match="SLUICE_POLICY_BUCKET"):
        registry.publish_built_in()

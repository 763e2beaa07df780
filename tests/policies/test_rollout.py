"""The state of a rollout, and who gets what."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.errors import ConfigurationError
from services.policies.rollout import Canary, Rollout, Shadow

versions = st.integers(1, 4)
IDS = [f"upl-{n}" for n in range(4000)]


def share(rollout: Rollout, version: int) -> float:
    return sum(rollout.choose_version("default", id_, "t") == version for id_ in IDS) / len(IDS)


@given(st.lists(versions, min_size=1, max_size=20))
def test_rollbacks_visit_the_earlier_active_versions(activated: list[int]) -> None:
    rollout = Rollout()
    for version in activated:
        rollout = rollout.with_active(version)
    walked = [rollout.active]
    while rollout.earlier:
        rollout = rollout.with_rollback()
        walked.append(rollout.active)
    changes = [v for v, before in zip(activated, [None, *activated], strict=False) if v != before]
    assert walked == changes[::-1]
    with pytest.raises(ConfigurationError, match="no earlier"):
        rollout.with_rollback()


def test_second_rollback_does_not_return_to_the_bad_version() -> None:
    rollout = Rollout().with_active(1).with_active(2).with_active(3)
    assert rollout.with_rollback().with_rollback().active == 1


@given(st.floats(0, 100), st.floats(0, 100))
def test_larger_canary_contains_the_smaller_one(a: float, b: float) -> None:
    small, large = sorted((a, b))
    rollout = Rollout().with_active(1)
    few = rollout.with_canary(Canary(version=2, percent=small))
    many = rollout.with_canary(Canary(version=2, percent=large))
    for id_ in IDS[:200]:
        if few.choose_version("default", id_, "t") == 2:
            assert many.choose_version("default", id_, "t") == 2


@pytest.mark.parametrize("percent", [0, 5, 50, 100])
def test_canary_gets_its_share(percent: float) -> None:
    rollout = Rollout().with_active(1).with_canary(Canary(version=2, percent=percent, tenants=frozenset({"acme"})))
    assert share(rollout, 2) == pytest.approx(percent / 100, abs=0.03)
    assert rollout.choose_version("default", "any", "acme") == 2


def test_canary_and_shadow_are_independent() -> None:
    rollout = (
        Rollout().with_active(1).with_canary(Canary(version=2, percent=50)).with_shadow(Shadow(version=3, percent=50))
    )
    both = sum(rollout.choose_version("p", i, "t") == 2 and rollout.choose_shadow("p", i) == 3 for i in IDS) / len(IDS)
    assert both == pytest.approx(0.25, abs=0.04)


def test_trip_ends_the_canary_and_activation_ends_the_trip() -> None:
    rollout = Rollout().with_active(1).with_canary(Canary(version=2, percent=50)).with_tripped(2)
    assert (rollout.canary, rollout.active, rollout.tripped) == (None, 1, {2})
    assert rollout.with_active(2).tripped == frozenset()
    assert rollout.with_canary(Canary(version=2, percent=1)).tripped == frozenset()
    assert rollout.with_active(3).with_rollback().tripped == {2}, "rolling back is no judgement of the version"


def test_invalid_change_is_rejected() -> None:
    with pytest.raises(ConfigurationError, match="activate one first"):
        Rollout().with_canary(Canary(version=1, percent=5))
    with pytest.raises(ConfigurationError, match="activate one first"):
        Rollout().with_shadow(Shadow(version=1, percent=5))
    with pytest.raises(ConfigurationError, match="is the active one"):
        Rollout().with_active(1).with_canary(Canary(version=1, percent=5))

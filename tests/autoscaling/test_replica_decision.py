"""The scaling decision: properties for any observation, and examples."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pipelines.autoscaling.replica_decision import (
    Arrivals,
    Backlog,
    Observation,
    ReplicaBounds,
    ReplicaCounts,
    Rules,
    decide_replicas,
)

RULES = Rules(objective_s=300, replica_rate=5, start_s=120)
LONG_AGO = 1e6


def make_guard(
    running: int, loading: int = 0, *, since_s: float = LONG_AGO, minimum: int = 0, maximum: int = 100
) -> ReplicaCounts:
    return ReplicaCounts(running, running + loading, ReplicaBounds(minimum, maximum), since_s, since_s)


def make_observation(
    rate: float = 0,
    waiting: float = 0,
    running: int = 0,
    loading: int = 0,
    *,
    by_partition: Mapping[int, float] | None = None,
    **more: Any,
) -> Observation:
    fields = {
        "guard": make_guard(running, loading),
        "intake": ReplicaCounts(1, 1, ReplicaBounds(1, 12)),
        "live": Backlog(waiting, by_partition or {}, 12),
        "arrivals": Arrivals(rate, rate),
        "measured_for_s": LONG_AGO,
    }
    return Observation(**{**fields, **more})


def observations() -> st.SearchStrategy[Observation]:
    count = st.integers(0, 60)
    since = st.none() | st.floats(0, 2000)
    bounds = st.tuples(st.integers(0, 50), st.integers(1, 200)).map(lambda pair: ReplicaBounds(min(pair), max(pair)))
    fleets = st.builds(
        lambda running, loading, bounds, up, down: ReplicaCounts(running, running + loading, bounds, up, down),
        *(count, count, bounds, since, since),
    )
    members = st.builds(
        lambda running, loading, maximum: ReplicaCounts(
            max(1, running), max(1, running) + loading, ReplicaBounds(1, maximum)
        ),
        *(count, count, st.integers(1, 100)),
    )
    amounts = st.floats(0, 1e6)
    backlogs = st.lists(amounts, max_size=12).map(lambda each: Backlog(sum(each), dict(enumerate(each)), 12))
    return st.builds(
        Observation,
        guard=fleets,
        intake=members,
        live=st.none() | backlogs,
        arrivals=st.none()
        | st.builds(lambda rate, more: Arrivals(rate, rate + more), st.floats(0, 1e4), st.floats(0, 1e4)),
        backfill_peak=amounts,
        replica_rate=st.none() | st.floats(0.1, 100),
        start_s=st.none() | st.floats(0, 1000),
        idle_s=st.floats(0, 2000),
        other_calls_at_guard=st.floats(0, 500),
        measured_for_s=st.floats(0, 2000),
        underused_s=st.floats(0, 200),
    )


@given(observations())
def test_decision_stays_within_the_bounds(observation: Observation) -> None:
    decision = decide_replicas(observation, RULES)
    assert observation.guard.bounds.minimum <= decision.guard <= observation.guard.bounds.maximum
    assert 1 <= decision.intake <= observation.intake.bounds.maximum


@given(observations(), st.integers(0, 11), st.floats(0, 1e6))
def test_more_backlog_never_wants_fewer_guards(observation: Observation, partition: int, more: float) -> None:
    if observation.live is None:
        return
    by_partition = dict(observation.live.by_partition)
    by_partition[partition] = by_partition.get(partition, 0) + more
    larger = replace(observation, live=Backlog(observation.live.total + more, by_partition, 12))
    assert decide_replicas(larger, RULES).guard >= decide_replicas(observation, RULES).guard


@given(observations(), st.floats(0, 1e4))
def test_more_arrivals_never_want_fewer_guards(observation: Observation, more: float) -> None:
    if observation.arrivals is None:
        return
    faster = replace(observation, arrivals=Arrivals(observation.arrivals.rate + more, observation.arrivals.peak + more))
    assert decide_replicas(faster, RULES).guard >= decide_replicas(observation, RULES).guard


@given(observations(), st.sampled_from(["live", "arrivals"]))
def test_missing_numbers_keep_the_present_replicas(observation: Observation, missing: str) -> None:
    decision = decide_replicas(replace(observation, **{missing: None}), RULES)
    assert decision.guard == observation.guard.bounds.clamp(observation.guard.target)
    assert decision.intake == observation.intake.bounds.clamp(observation.intake.target)


@given(observations())
def test_loading_replicas_are_not_requested_again(observation: Observation) -> None:
    """A second decision on the same numbers wants the same replicas, also while they load."""
    decision = decide_replicas(observation, RULES)
    fleet = observation.guard
    asked = replace(fleet, target=max(decision.guard, fleet.running), since_scale_up_s=0.0)
    again = decide_replicas(replace(observation, guard=asked), RULES)
    assert again.guard == decision.guard or decision.guard < fleet.target


def test_scale_up_takes_one_step() -> None:
    first = decide_replicas(make_observation(rate=100, waiting=30_000, running=2), RULES)
    assert first.guard > 20
    after = decide_replicas(make_observation(rate=100, waiting=30_000, running=2, loading=first.guard - 2), RULES)
    assert after.guard == first.guard


def test_first_submission_starts_a_replica() -> None:
    assert decide_replicas(make_observation(waiting=1), RULES).guard == 1


def test_guard_goes_to_zero_only_after_the_idle_time() -> None:
    assert decide_replicas(make_observation(running=1, idle_s=RULES.idle_s - 1), RULES).guard == 1
    assert decide_replicas(make_observation(running=1, idle_s=RULES.idle_s), RULES).guard == 0
    held = make_observation(guard=make_guard(1, minimum=1), idle_s=RULES.idle_s)
    assert decide_replicas(held, RULES).guard == 1


def test_scale_down_waits_for_the_delay() -> None:
    recent = make_observation(rate=5, guard=make_guard(10, since_s=RULES.scale_down_s - 1))
    assert decide_replicas(recent, RULES).guard == 10
    assert decide_replicas(make_observation(rate=5, running=10), RULES).guard == 2


def test_scale_down_keeps_the_replicas_that_the_backlog_needs() -> None:
    """Ten replicas would drain the backlog before others could start; removed replicas do not help."""
    assert decide_replicas(make_observation(rate=5, running=10, waiting=5000), RULES).guard == 6
    assert decide_replicas(make_observation(rate=5, running=10, waiting=20), RULES).guard == 2


def test_replicas_that_never_start_are_no_longer_requested() -> None:
    stuck = make_observation(rate=5, guard=make_guard(5, 50))
    assert decide_replicas(stuck, RULES).guard == 2


def test_backfill_adds_the_replicas_of_its_own_objective() -> None:
    backfill = RULES.backfill_objective_s * RULES.replica_rate * 3
    assert decide_replicas(make_observation(backfill_peak=backfill), RULES).guard == 3
    live = decide_replicas(make_observation(rate=95, running=20), RULES).guard
    assert decide_replicas(make_observation(rate=95, running=20, backfill_peak=backfill), RULES).guard == live + 3


def test_busiest_partition_adds_replicas() -> None:
    even = dict.fromkeys(range(12), 225.0)
    skewed = {0: 2700.0} | dict.fromkeys(range(1, 12), 0.0)
    assert decide_replicas(make_observation(waiting=2700, running=3, by_partition=even), RULES).guard == 3
    assert decide_replicas(make_observation(waiting=2700, running=3, by_partition=skewed), RULES).guard == 4
    assert (
        decide_replicas(make_observation(waiting=9000, running=1, by_partition={0: 4000, 1: 5000}), RULES).intake == 12
    )


def test_hot_key_requests_no_replicas_that_it_cannot_use() -> None:
    decision = decide_replicas(make_observation(rate=10, running=10, waiting=1e9, by_partition={0: 1e9}), RULES)
    assert decision.guard < 20


def test_underused_guard_is_not_enlarged() -> None:
    waiting = make_observation(rate=10, waiting=1e6, running=2)
    underused = decide_replicas(replace(waiting, underused_s=60), RULES)
    assert decide_replicas(waiting, RULES).guard > 2
    assert underused.guard == 2
    assert underused.intake > 1


def test_other_callers_of_the_guard_add_replicas() -> None:
    assert decide_replicas(make_observation(other_calls_at_guard=1), RULES).guard == 1
    assert decide_replicas(make_observation(rate=45, running=9, other_calls_at_guard=32), RULES).guard == 12


def test_intake_follows_the_guard() -> None:
    assert decide_replicas(make_observation(rate=95, running=20), RULES).intake == 7
    assert (
        decide_replicas(make_observation(rate=950, running=20), RULES).intake == 12
    )  # as many as there are partitions
    busy = ReplicaCounts(7, 7, ReplicaBounds(1, 12), LONG_AGO, LONG_AGO)
    assert (
        decide_replicas(make_observation(rate=80, running=17, intake=busy), RULES).intake == 7
    )  # not worth a rebalance
    assert decide_replicas(make_observation(rate=5, running=2, intake=busy), RULES).intake == 1

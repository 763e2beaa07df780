"""The scaling decision, what it measures, and its wrapper under Ray Serve's own bookkeeping."""

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.serve._private.autoscaling_state import ApplicationAutoscalingState
from ray.serve._private.common import DeploymentID, ReplicaID, ReplicaMetricReport, TimeStampedValue
from ray.serve._private.config import DeploymentConfig
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from pipelines.autoscaling.serve_policy import (
    Arrivals,
    Backlog,
    Measurements,
    Observation,
    Reading,
    ReplicaBounds,
    ReplicaCounts,
    Rules,
    decide,
    serve_options,
)

RULES = Rules(objective_s=300, replica_rate=5, start_s=120)
LONG_AGO = 1e6


def guard(
    running: int, loading: int = 0, *, since_s: float = LONG_AGO, least: int = 0, most: int = 100
) -> ReplicaCounts:
    return ReplicaCounts(running, running + loading, ReplicaBounds(least, most), since_s, since_s)


def seen(
    rate: float = 0,
    waiting: float = 0,
    running: int = 0,
    loading: int = 0,
    *,
    by_partition: Mapping[int, float] | None = None,
    **more: Any,
) -> Observation:
    fields = {
        "guard": guard(running, loading),
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
        lambda running, loading, most: ReplicaCounts(
            max(1, running), max(1, running) + loading, ReplicaBounds(1, most)
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
        active_callers=st.floats(0, 500),
        measured_for_s=st.floats(0, 2000),
        underused_s=st.floats(0, 200),
    )


@given(observations())
def test_within_the_bounds(observation: Observation) -> None:
    decision = decide(observation, RULES)
    assert observation.guard.bounds.minimum <= decision.guard <= observation.guard.bounds.maximum
    assert 1 <= decision.intake <= observation.intake.bounds.maximum


@given(observations(), st.integers(0, 11), st.floats(0, 1e6))
def test_more_backlog_never_wants_fewer(observation: Observation, partition: int, more: float) -> None:
    if observation.live is None:
        return
    by_partition = dict(observation.live.by_partition)
    by_partition[partition] = by_partition.get(partition, 0) + more
    larger = replace(observation, live=Backlog(observation.live.total + more, by_partition, 12))
    assert decide(larger, RULES).guard >= decide(observation, RULES).guard


@given(observations(), st.floats(0, 1e4))
def test_more_arrivals_never_want_fewer(observation: Observation, more: float) -> None:
    if observation.arrivals is None:
        return
    faster = replace(observation, arrivals=Arrivals(observation.arrivals.rate + more, observation.arrivals.peak + more))
    assert decide(faster, RULES).guard >= decide(observation, RULES).guard


@given(observations(), st.sampled_from(["live", "arrivals"]))
def test_missing_numbers_hold(observation: Observation, missing: str) -> None:
    decision = decide(replace(observation, **{missing: None}), RULES)
    assert decision.guard == observation.guard.bounds.clamp(observation.guard.target)
    assert decision.intake == observation.intake.bounds.clamp(observation.intake.target)


@given(observations())
def test_loading_replicas_count(observation: Observation) -> None:
    """What was asked for is not asked for again when nothing else has changed, and what loads is not taken back."""
    decision = decide(observation, RULES)
    fleet = observation.guard
    asked = replace(fleet, target=max(decision.guard, fleet.running), since_scale_up_s=0.0)
    again = decide(replace(observation, guard=asked), RULES)
    assert again.guard == decision.guard or decision.guard < fleet.target


def test_up_in_one_step() -> None:
    first = decide(seen(rate=100, waiting=30_000, running=2), RULES)
    assert first.guard > 20
    after = decide(seen(rate=100, waiting=30_000, running=2, loading=first.guard - 2), RULES)
    assert after.guard == first.guard


def test_first_submission_starts_a_replica() -> None:
    assert decide(seen(waiting=1), RULES).guard == 1


def test_zero_only_after_a_while() -> None:
    assert decide(seen(running=1, idle_s=RULES.idle_s - 1), RULES).guard == 1
    assert decide(seen(running=1, idle_s=RULES.idle_s), RULES).guard == 0
    held = seen(guard=guard(1, least=1), idle_s=RULES.idle_s)
    assert decide(held, RULES).guard == 1


def test_down_only_after_a_while() -> None:
    recent = seen(rate=5, guard=guard(10, since_s=RULES.scale_down_s - 1))
    assert decide(recent, RULES).guard == 10
    assert decide(seen(rate=5, running=10), RULES).guard == 2


def test_a_controller_that_starts_anew_takes_nothing_away() -> None:
    """Serve's controller forgets when it last scaled, and all that was measured; its replicas go on."""
    measured = Measurements(RULES)
    running, members = ReplicaCounts(20, 20, ReplicaBounds(0, 100)), ReplicaCounts(8, 8, ReplicaBounds(1, 12))
    found = {}
    for second in range(int(RULES.scale_down_s) + 2):
        live = Backlog(100, partitions=12)
        measured.record_replicas(second, running)
        measured.record_reading(Reading(second, live, 5.0 * second, at_guard=100), running)
        found[second] = decide(measured.observe(second, running, members, live), RULES)
    assert (found[1].guard, found[1].intake) == (20, 8)
    assert (found[239].guard, found[239].intake) == (20, 8)
    assert found[240].guard < 5
    assert found[240].intake < 4


def test_not_down_while_what_waits_needs_them() -> None:
    """Ten replicas would be done with it before others could start; those that are taken away do not help."""
    assert decide(seen(rate=5, running=10, waiting=5000), RULES).guard == 6
    assert decide(seen(rate=5, running=10, waiting=20), RULES).guard == 2


def test_what_never_comes_is_given_up() -> None:
    stuck = seen(rate=5, guard=guard(5, 50))
    assert decide(stuck, RULES).guard == 2


def test_backfill_has_its_own_pace() -> None:
    backfill = RULES.backfill_objective_s * RULES.replica_rate * 3
    assert decide(seen(backfill_peak=backfill), RULES).guard == 3
    live = decide(seen(rate=95, running=20), RULES).guard
    assert decide(seen(rate=95, running=20, backfill_peak=backfill), RULES).guard == live + 3


def test_the_busiest_partition_counts() -> None:
    even = dict.fromkeys(range(12), 225.0)
    skewed = {0: 2700.0} | dict.fromkeys(range(1, 12), 0.0)
    assert decide(seen(waiting=2700, running=3, by_partition=even), RULES).guard == 3
    assert decide(seen(waiting=2700, running=3, by_partition=skewed), RULES).guard == 4
    assert decide(seen(waiting=9000, running=1, by_partition={0: 4000, 1: 5000}), RULES).intake == 12


def test_one_hot_key_does_not_ask_for_replicas_that_it_cannot_use() -> None:
    hopeless = decide(seen(rate=10, running=10, waiting=1e9, by_partition={0: 1e9}), RULES)
    assert hopeless.guard < 20


def test_a_guard_that_is_not_what_is_slow_is_not_enlarged() -> None:
    waiting = seen(rate=10, waiting=1e6, running=2)
    starved = decide(replace(waiting, underused_s=60), RULES)
    assert decide(waiting, RULES).guard > 2
    assert starved.guard == 2
    assert starved.intake > 1


def test_others_who_call_the_guard_count() -> None:
    assert decide(seen(active_callers=1), RULES).guard == 1
    assert decide(seen(rate=45, running=9, active_callers=32), RULES).guard == 12


def test_intake_follows_the_guard() -> None:
    assert decide(seen(rate=95, running=20), RULES).intake == 7
    assert decide(seen(rate=950, running=20), RULES).intake == 12  # as many as there are partitions
    busy = ReplicaCounts(7, 7, ReplicaBounds(1, 12), LONG_AGO, LONG_AGO)
    assert decide(seen(rate=80, running=17, intake=busy), RULES).intake == 7  # not worth a rebalance
    assert decide(seen(rate=5, running=2, intake=busy), RULES).intake == 1


class Stream:
    """A constant load on a fleet that is always large enough, read every second."""

    def __init__(self, rules: Rules, rate: float) -> None:
        self.measured, self.rules, self.rate = Measurements(rules), rules, rate
        self.target, self.changed_s = 0, -LONG_AGO
        self.history: list[int] = []

    def run(self, since_s: int, until_s: int, noise: list[float]) -> None:
        for now_s in range(since_s, until_s):
            arrived = self.rate * now_s + noise[now_s % len(noise)]
            fleet = ReplicaCounts(
                self.target, self.target, ReplicaBounds(0, 500), now_s - self.changed_s, now_s - self.changed_s
            )
            live = Backlog(0.0 if self.target else self.rate)
            self.measured.record_replicas(now_s, fleet)
            self.measured.record_reading(Reading(now_s, live, arrived), fleet)
            observed = self.measured.observe(now_s, fleet, ReplicaCounts(1, 1, ReplicaBounds(1, 1)), live)
            wanted = decide(observed, self.rules).guard
            if wanted != self.target:
                self.target, self.changed_s = wanted, now_s
            self.history.append(wanted)


@settings(max_examples=40)
@given(st.floats(0.5, 500), st.lists(st.floats(0, 1), min_size=7, max_size=31))
def test_a_constant_load_does_not_flap(rate: float, noise: list[float]) -> None:
    stream = Stream(RULES, rate)
    stream.run(0, 1500, [each * rate**0.5 for each in noise])
    settled = stream.history[500:]
    assert sum(one != other for one, other in pairwise(settled)) <= 1


def test_the_rate_of_a_replica_is_measured_when_the_guard_is_full() -> None:
    measured = Measurements(RULES)
    fleet = guard(4)
    for second in range(30):
        waiting = 10_000.0 - 28 * second
        measured.record_reading(Reading(second, Backlog(waiting), 10_000, at_guard=64), fleet)
    assert measured.replica_rate == pytest.approx(7)
    idle = Measurements(RULES)
    for second in range(30):
        idle.record_reading(Reading(second, Backlog(0), 28.0 * second, at_guard=10), fleet)
    assert idle.replica_rate is None


def test_the_start_of_a_replica_is_measured() -> None:
    measured = Measurements(RULES)
    measured.record_replicas(0, guard(0, 0))
    measured.record_replicas(10, guard(0, 3))
    measured.record_replicas(100, guard(3, 0))
    assert measured.start_s == pytest.approx(90)
    measured.record_replicas(110, guard(2, 1))  # one was lost, and is replaced
    measured.record_replicas(160, guard(3, 0))
    assert measured.start_s == pytest.approx(0.95 * 90 + 0.05 * 50)


def test_a_stream_that_is_made_anew_is_measured_anew() -> None:
    measured = Measurements(RULES)
    for second in range(90):
        measured.record_reading(Reading(second, Backlog(0), 1e6 + 10 * second), guard(2))
    measured.record_reading(Reading(90, Backlog(0), 0), guard(2))
    assert measured.observe(90, guard(2), guard(1), Backlog(0)).arrivals is None
    measured.record_reading(Reading(91, Backlog(0), 10), guard(2))
    arrivals = measured.observe(91, guard(2), guard(1), Backlog(0)).arrivals
    assert arrivals is not None
    assert arrivals.rate == pytest.approx(10)


# Under Serve's own bookkeeping

GUARD, INTAKE = DeploymentID("Guard", "sluice"), DeploymentID("Intake", "sluice")


ANY_NUMBER = ReplicaBounds(0, 100)


class Controller:
    """What Serve's controller holds of an application, without a cluster."""

    def __init__(self, guard_bounds: ReplicaBounds = ANY_NUMBER, **rules: Any) -> None:
        policy = AutoscalingPolicy(
            policy_function="pipelines.autoscaling.serve_policy:BacklogScaling", policy_kwargs=rules
        )
        self.state = ApplicationAutoscalingState("sluice")
        self.state.register(policy)
        self.targets = {GUARD: guard_bounds.minimum, INTAKE: 1}
        for deployment, bounds in ((GUARD, guard_bounds), (INTAKE, ReplicaBounds(1, 12))):
            config = DeploymentConfig(autoscaling_config=AutoscalingConfig(**serve_options(bounds)))
            info = DeploymentInfo(config, None, 0, "", version="1")  # type: ignore[arg-type]  # no replica is made of it
            self.state.register_deployment(deployment, info, self.targets[deployment])
        self.run(GUARD, guard_bounds.minimum)
        self.run(INTAKE, 1)

    def run(self, deployment: DeploymentID, count: int) -> None:
        self.state.update_running_replica_ids(deployment, [ReplicaID(str(n), deployment) for n in range(count)])

    def report(self, metrics: Mapping[str, float], *, at_s: float | None = None, replica: int = 0) -> None:
        at_s = at_s or time.time()
        points = {name: [TimeStampedValue(at_s, value)] for name, value in metrics.items()}
        self.state.record_request_metrics_for_replica(
            ReplicaMetricReport(ReplicaID(str(replica), INTAKE), points, at_s)
        )

    def decide(self) -> dict[DeploymentID, int]:
        self.targets |= self.state.get_decision_num_replicas(self.targets)
        return self.targets


def metrics(backlog: float, published: float, **more: float) -> dict[str, float]:
    return {"live_backlog": backlog, "live_published": published, "live_partitions": 12, "at_guard": 0} | more


def test_serve_scales_from_zero_in_one_step_though_calls_wait_at_a_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(every_s=0, replica_rate=5)
    guard_state = controller.state._deployment_autoscaling_states[GUARD]
    monkeypatch.setattr(guard_state, "get_total_num_requests", lambda: 64.0)
    now_s = time.time()
    controller.report(metrics(0, 1000), at_s=now_s - 2)
    controller.decide()
    controller.report(metrics(3000, 4000), at_s=now_s)
    assert controller.decide()[GUARD] > 10


def test_serve_scales_to_zero() -> None:
    controller = Controller(every_s=0, idle_s=10, scale_down_s=10)
    controller.targets[GUARD] = 3
    controller.run(GUARD, 3)
    for ago_s in range(20, 10, -2):
        controller.report(metrics(0, 1000), at_s=time.time() - ago_s)
        controller.decide()
        controller.run(GUARD, controller.targets[GUARD])
    assert controller.targets[GUARD] == 0


@pytest.mark.parametrize("case", ["nothing", "stale", "no rate", "not a number"])
def test_serve_holds_when_numbers_are_missing(case: str) -> None:
    controller = Controller(every_s=0)
    controller.targets[GUARD] = 7
    controller.run(GUARD, 7)
    if case == "stale":
        controller.report(metrics(1e6, 1e6), at_s=time.time() - 60)
    elif case == "no rate":
        controller.report({"live_backlog": 1e6})
    elif case == "not a number":
        controller.report(metrics(float("nan"), 1e6))
    assert controller.decide() == {GUARD: 7, INTAKE: 1}


def test_a_call_by_another_way_wakes_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(every_s=0)
    guard_state = controller.state._deployment_autoscaling_states[GUARD]
    monkeypatch.setattr(guard_state, "get_total_num_requests", lambda: 1.0)
    for ago_s in (4, 2):
        controller.report(metrics(0, 1000), at_s=time.time() - ago_s)
        controller.decide()
    assert controller.targets[GUARD] == 1


def test_a_fault_is_logged_once_and_holds(caplog: pytest.LogCaptureFixture) -> None:
    controller = Controller(every_s=0)
    controller.state.deregister_deployment(INTAKE)
    logger = logging.getLogger("ray.serve")
    logger.addHandler(caplog.handler)
    try:
        for _ in range(3):
            assert controller.state.get_decision_num_replicas({GUARD: 7}) == {}
    finally:
        logger.removeHandler(caplog.handler)
    assert sum("cannot decide on replicas" in record.message for record in caplog.records) == 1


def test_members_report_their_own_partitions() -> None:
    controller = Controller(every_s=0, replica_rate=5)
    controller.run(INTAKE, 2)
    now_s = time.time()
    controller.report(metrics(0, 0), at_s=now_s - 3)
    controller.decide()
    controller.report(metrics(5000, 5000) | {"live_backlog_0": 5000}, at_s=now_s - 1, replica=0)
    controller.report(metrics(5000, 5000) | {"live_backlog_1": 0}, at_s=now_s, replica=1)
    assert controller.decide()[INTAKE] == 12

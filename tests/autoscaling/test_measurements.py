"""The measurements of a series of readings, alone and together with the decision."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.autoscaling.measurements import Measurements, Reading
from pipelines.autoscaling.replica_decision import Backlog, ReplicaBounds, ReplicaCounts, Rules, decide_replicas

RULES = Rules(objective_s=300, replica_rate=5, start_s=120)
LONG_AGO = 1e6


def guard(running: int, loading: int = 0) -> ReplicaCounts:
    return ReplicaCounts(running, running + loading, ReplicaBounds(0, 100), LONG_AGO, LONG_AGO)


def test_restarted_controller_takes_no_replica_away() -> None:
    """A restarted controller of Serve has lost the measurements and the time of its last change."""
    measured = Measurements(RULES)
    running, members = ReplicaCounts(20, 20, ReplicaBounds(0, 100)), ReplicaCounts(8, 8, ReplicaBounds(1, 12))
    found = {}
    for second in range(int(RULES.scale_down_s) + 2):
        live = Backlog(100, partitions=12)
        measured.record_replicas(second, running)
        measured.record_reading(Reading(second, live, 5.0 * second, at_guard=100), running)
        found[second] = decide_replicas(measured.observe(second, running, members, live), RULES)
    assert (found[1].guard, found[1].intake) == (20, 8)
    assert (found[239].guard, found[239].intake) == (20, 8)
    assert found[240].guard < 5
    assert found[240].intake < 4


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
            wanted = decide_replicas(observed, self.rules).guard
            if wanted != self.target:
                self.target, self.changed_s = wanted, now_s
            self.history.append(wanted)


@settings(max_examples=40)
@given(st.floats(0.5, 500), st.lists(st.floats(0, 1), min_size=7, max_size=31))
def test_constant_load_does_not_flap(rate: float, noise: list[float]) -> None:
    stream = Stream(RULES, rate)
    stream.run(0, 1500, [each * rate**0.5 for each in noise])
    settled = stream.history[500:]
    assert sum(one != other for one, other in pairwise(settled)) <= 1


def test_replica_rate_is_measured_only_while_the_guard_is_full() -> None:
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


def test_replica_start_is_measured() -> None:
    measured = Measurements(RULES)
    measured.record_replicas(0, guard(0, 0))
    measured.record_replicas(10, guard(0, 3))
    measured.record_replicas(100, guard(3, 0))
    assert measured.start_s == pytest.approx(90)
    measured.record_replicas(110, guard(2, 1))  # one was lost, and is replaced
    measured.record_replicas(160, guard(3, 0))
    assert measured.start_s == pytest.approx(0.95 * 90 + 0.05 * 50)


def test_recreated_stream_is_measured_from_the_beginning() -> None:
    measured = Measurements(RULES)
    for second in range(90):
        measured.record_reading(Reading(second, Backlog(0), 1e6 + 10 * second), guard(2))
    measured.record_reading(Reading(90, Backlog(0), 0), guard(2))
    assert measured.observe(90, guard(2), guard(1), Backlog(0)).arrivals is None
    measured.record_reading(Reading(91, Backlog(0), 10), guard(2))
    arrivals = measured.observe(91, guard(2), guard(1), Backlog(0)).arrivals
    assert arrivals is not None
    assert arrivals.rate == pytest.approx(10)

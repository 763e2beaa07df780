"""How many replicas of Guard and Intake the backlog needs: a pure function of what was observed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

_UNDERUSED_S: Final = 60.0
"""A guard that was underused for this long is not the bottleneck."""
_WAIT_SHARE: Final = 0.64
"""Share of the objective that a submission may wait; the rest is for what was not foreseen."""
_CATCH_UP_SHARE: Final = 0.25
"""Share of a start within which a backlog is drained whose objective is lost, because it is shorter than the start."""
INTAKE_OVERSUBSCRIPTION: Final = 1.25
"""Intake works on so many times what the guard does, so that the next ones are at hand."""
_INTAKE_SHRINK_SHARE: Final = 0.7
"""Intake shrinks only to at most this share: each change moves partitions."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What the decision is told. Durations in seconds."""

    objective_s: float = 300.0
    """Drain-time objective: from submission to verdict."""
    backfill_objective_s: float = 6 * 3600.0
    """In which backfill is to be done where live work leaves the room."""
    replica_rate: float = 5.0
    """Submissions a second that one guard replica judges, until it is measured."""
    start_s: float = 300.0
    """From the wish for a replica until it judges, until it is measured."""
    guard_in_flight: int = 16
    """Submissions that a guard replica works on at a time."""
    intake_in_flight: int = 64
    """Submissions that an intake replica works on at a time."""
    headroom: float = 0.05
    """Share of a fleet that is to stay free at a constant load."""
    idle_s: float = 600.0
    """After how long without anything to do the guard may go to zero."""
    scale_down_s: float = 240.0
    """For how long fewer replicas must have been enough before any is taken away."""
    scale_down_every_s: float = 60.0
    """Between two steps down."""
    stale_s: float = 30.0
    """Numbers older than this are not known."""
    every_s: float = 1.0
    """Between two decisions."""


@dataclass(frozen=True, slots=True)
class ReplicaBounds:
    """Fewest and most replicas."""

    minimum: int
    maximum: int

    def clamp(self, replicas: int) -> int:
        return max(self.minimum, min(self.maximum, replicas))


@dataclass(frozen=True, slots=True)
class ReplicaCounts:
    """One deployment's replicas, and the seconds since its last changes (None: it never changed)."""

    running: int
    target: int
    """Running and still loading."""
    bounds: ReplicaBounds
    since_scale_up_s: float | None = None
    since_scale_down_s: float | None = None

    @property
    def loading(self) -> int:
        return max(0, self.target - self.running)


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Live submissions a second."""

    rate: float
    """Now, high enough to be believed."""
    peak: float
    """The highest of the last `scale_down_s`."""


@dataclass(frozen=True, slots=True)
class Backlog:
    """Messages published and not settled."""

    total: float
    by_partition: Mapping[int, float] = field(default_factory=dict)
    partitions: int = 0
    """0: every member may take every message."""

    @property
    def busiest_partition(self) -> float:
        return max(self.by_partition.values(), default=0.0)


@dataclass(frozen=True, slots=True)
class Observation:
    """What is known at one moment. None: not known, which holds the present state."""

    guard: ReplicaCounts
    intake: ReplicaCounts
    live: Backlog | None = None
    arrivals: Arrivals | None = None
    backfill_peak: float = 0.0
    """The most backfill that has waited since there was none; 0: none waits."""
    replica_rate: float | None = None
    """Measured; None: not yet."""
    start_s: float | None = None
    """Measured; None: not yet."""
    idle_s: float = 0.0
    """Since when there has been nothing to do."""
    active_callers: float = 0.0
    """Submissions that others than Intake have at the guard."""
    measured_for_s: float = 0.0
    """For how long it has been measured. A controller that starts anew knows nothing of before."""
    underused_s: float = 0.0
    """Since when the guard has had less to do than it could, although something waits."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Wanted replicas, and why, for the log."""

    guard: int
    intake: int
    reason: str


def decide(observed: Observation, rules: Rules) -> Decision:
    """The wanted replicas.

    Up in one step to what the objective needs, replicas that are still loading counted; down slowly; to zero when
    nothing has come for a while, and up from it with the first submission. What is not known changes nothing.
    """
    if observed.live is None or observed.arrivals is None:
        intake = max(1, observed.intake.bounds.clamp(observed.intake.target))
        return Decision(
            observed.guard.bounds.clamp(observed.guard.target), intake, "no current measurement, so nothing changes"
        )
    guard, reason = _decide_guard(observed, observed.live, observed.arrivals, rules)
    return Decision(guard, _decide_intake(observed, observed.live, guard, rules), reason)


def _decide_guard(observed: Observation, live: Backlog, arrivals: Arrivals, rules: Rules) -> tuple[int, str]:
    counts = observed.guard
    minimum = _replicas_for_objective(observed, live, arrivals.rate, rules)
    desired = max(minimum, _replicas_for_objective(observed, live, arrivals.rate, rules, rules.headroom))
    peak = _replicas_for_objective(observed, live, arrivals.peak, rules, rules.headroom)
    retained = max(desired, peak, _replicas_to_drain(observed, live, rules))
    if observed.idle_s < rules.idle_s:
        retained = max(retained, min(1, counts.target))
    target, reason = counts.target, "enough replicas"
    if minimum > counts.target and counts.running and observed.underused_s >= _UNDERUSED_S:
        reason = "guard is not the bottleneck"
    elif minimum > counts.target:
        target, reason = desired, "the objective needs more replicas"
    elif retained < counts.target:
        reason = "fewer replicas suffice, but not for long enough yet"
        long_enough = observed.measured_for_s >= rules.scale_down_s and _has_elapsed(
            counts.since_scale_up_s, rules.scale_down_s
        )
        if long_enough and _has_elapsed(counts.since_scale_down_s, rules.scale_down_every_s):
            target, reason = retained, "fewer replicas suffice"
    return counts.bounds.clamp(target), reason


def _replicas_for_objective(
    observed: Observation, live: Backlog, rate: float, rules: Rules, headroom: float = 0.0
) -> int:
    """Guard replicas that keep every live submission within the objective, and backfill at its pace.

    Those that are asked for now judge after `start` seconds. Until then the running ones work on the backlog, and it
    grows by what they cannot do. Whoever comes just then waits behind all of it; whoever waits already also waits for
    the start. For an objective shorter than the start these are lost, and the backlog is drained as fast as a part of
    the start.
    """
    one, start_s = _replica_rate(observed, rules), _start_s(observed, rules)
    capacity, wait_budget_s = observed.guard.running * one, _WAIT_SHARE * rules.objective_s
    assignable = _assignable_backlog(observed, live, rules)
    at_start = max(0.0, assignable + (rate - capacity) * start_s) / max(wait_budget_s, _CATCH_UP_SHARE * start_s)
    already = max(0.0, assignable - capacity * start_s) / max(wait_budget_s - start_s, _CATCH_UP_SHARE * start_s)
    # Nobody can help that member later, so the busiest partition has half of the objective.
    busiest = min(_guards_per_member(rules) * one, 2 * live.busiest_partition / rules.objective_s)
    backfill = observed.backfill_peak / rules.backfill_objective_s
    work = max(rate / (1 - headroom), at_start, already, busiest) + backfill
    anything = live.total > 0 or work > 0 or observed.active_callers > 0
    replicas = work / one + observed.active_callers / rules.guard_in_flight
    return max(1 if anything else 0, math.ceil(round(replicas, 6)))


def _decide_intake(observed: Observation, live: Backlog, guard: int, rules: Rules) -> int:
    """Members that keep the guard busy, and do not let the busiest partition share one if that makes it late."""
    counts = observed.intake
    desired = math.ceil(INTAKE_OVERSUBSCRIPTION * guard * rules.guard_in_flight / rules.intake_in_flight)
    if live.partitions > 1 and live.busiest_partition > 0:
        in_time = _guards_per_member(rules) * _replica_rate(observed, rules) * rules.objective_s / 2
        another = (live.total - live.busiest_partition) / (live.partitions - 1)
        beside = (in_time - live.busiest_partition) / another if another > 0 else live.partitions
        desired = max(desired, math.ceil(live.partitions / (1 + max(0, math.floor(min(beside, live.partitions))))))
    if observed.underused_s >= _UNDERUSED_S and _has_elapsed(counts.since_scale_up_s, _UNDERUSED_S):
        desired = max(desired, counts.target + max(1, counts.target // 2))
    most = min(counts.bounds.maximum, live.partitions) if live.partitions else counts.bounds.maximum
    target = max(1, counts.bounds.minimum, min(most, max(desired, counts.target)))
    settled = _has_elapsed(counts.since_scale_up_s, 2 * rules.scale_down_s) and _has_elapsed(
        counts.since_scale_down_s, rules.scale_down_s
    )
    long_enough = settled and observed.measured_for_s >= rules.scale_down_s
    if desired <= _INTAKE_SHRINK_SHARE * counts.target and long_enough and not counts.loading:
        target = max(1, counts.bounds.minimum, min(most, desired))
    return target


def _replicas_to_drain(observed: Observation, live: Backlog, rules: Rules) -> int:
    """Guard replicas that work off in time what waits: those that go now do not help with it."""
    work = _assignable_backlog(observed, live, rules) / (_WAIT_SHARE * rules.objective_s)
    return math.ceil(round(work / _replica_rate(observed, rules), 6))


def _assignable_backlog(observed: Observation, live: Backlog, rules: Rules) -> float:
    """The live backlog; of a partition's no more than the one member that works it can give to the guard in time."""
    most = _guards_per_member(rules) * _replica_rate(observed, rules) * rules.objective_s
    if live.busiest_partition <= most:
        return live.total
    return live.total - sum(each - most for each in live.by_partition.values() if each > most)


def _replica_rate(observed: Observation, rules: Rules) -> float:
    return observed.replica_rate or rules.replica_rate


def _start_s(observed: Observation, rules: Rules) -> float:
    return rules.start_s if observed.start_s is None else observed.start_s


def _guards_per_member(rules: Rules) -> float:
    """How many guard replicas one intake member can keep busy."""
    return max(1.0, rules.intake_in_flight / rules.guard_in_flight)


def _has_elapsed(since_s: float | None, duration_s: float) -> bool:
    return since_s is None or since_s >= duration_s

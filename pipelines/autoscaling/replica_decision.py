"""How many replicas of Guard and Intake the backlog needs: a pure function of one observation."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

_UNDERUSED_S: Final = 60.0
"""After being underused for this long, the guard is not the bottleneck."""
_WAIT_SHARE: Final = 0.64
"""Share of the objective that a submission is planned to wait. The rest is a reserve. It was chosen on seeds 4 and 5
of the simulated day, see docs/benchmarks.md."""
_CATCH_UP_SHARE: Final = 0.25
"""If the objective is shorter than a replica's start, the backlog is late in any case. It is then drained within this
share of the start."""
INTAKE_OVERSUBSCRIPTION: Final = 1.25
"""Submissions in flight at Intake, as a multiple of those in flight at the guard, so that the guard never waits for the
next one."""
_INTAKE_SHRINK_SHARE: Final = 0.7
"""Intake shrinks only if this share of its members is enough, because each change moves partitions."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The configuration of the decision. Durations are in seconds, rates are submissions a second."""

    objective_s: float = 300.0
    """The longest time from submission to verdict."""
    backfill_objective_s: float = 6 * 3600.0
    """The time within which backfill is to be judged."""
    replica_rate: float = 5.0
    """Rate of one guard replica, until it is measured."""
    start_s: float = 300.0
    """Time from the request for a replica until it judges, until it is measured."""
    guard_in_flight: int = 16
    """Submissions that one guard replica judges at a time."""
    intake_in_flight: int = 64
    """Submissions that one intake replica has in flight."""
    headroom: float = 0.05
    """Share of the replicas that stays free at a constant load."""
    idle_s: float = 600.0
    """Time without work after which the guard may go to zero."""
    scale_down_s: float = 240.0
    """Time for which fewer replicas must have been enough before any is removed."""
    scale_down_every_s: float = 60.0
    """Time between two steps of a scale-down."""
    stale_s: float = 30.0
    """Recorded numbers older than this are ignored."""
    every_s: float = 1.0
    """Time between two decisions."""


@dataclass(frozen=True, slots=True)
class ReplicaBounds:
    """The fewest and the most replicas that are allowed."""

    minimum: int
    maximum: int

    def clamp(self, replicas: int) -> int:
        """Return the allowed number nearest to `replicas`."""
        return max(self.minimum, min(self.maximum, replicas))


@dataclass(frozen=True, slots=True)
class ReplicaCounts:
    """The replicas of one deployment, and the seconds since its last changes (None: it never changed)."""

    running: int
    target: int
    """Replicas that run or are still loading."""
    bounds: ReplicaBounds
    since_scale_up_s: float | None = None
    since_scale_down_s: float | None = None

    @property
    def loading(self) -> int:
        return max(0, self.target - self.running)


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Live submissions a second, measured."""

    rate: float
    """The present rate; a burst counts if it is larger than chance."""
    peak: float
    """The highest rate of the last `scale_down_s`."""


@dataclass(frozen=True, slots=True)
class Backlog:
    """Messages that are published and not acknowledged (on Kafka: whose offsets are not committed)."""

    total: float
    by_partition: Mapping[int, float] = field(default_factory=dict)
    partitions: int = 0
    """0 if every member may receive every message."""

    @property
    def busiest_partition(self) -> float:
        """The backlog of the busiest partition."""
        return max(self.by_partition.values(), default=0.0)


@dataclass(frozen=True, slots=True)
class Observation:
    """The measurements at one moment. None means that there is no measurement."""

    guard: ReplicaCounts
    intake: ReplicaCounts
    live: Backlog | None = None
    arrivals: Arrivals | None = None
    backfill_peak: float = 0.0
    """The largest backlog of backfill since it was last empty; 0 if it is empty."""
    replica_rate: float | None = None
    """Submissions a second of one guard replica."""
    start_s: float | None = None
    """Time from the request for a guard replica until it judges."""
    idle_s: float = 0.0
    """Time without work."""
    other_calls_at_guard: float = 0.0
    """Calls of deployments other than Intake, such as the gateway, that the guard has not answered."""
    measured_for_s: float = 0.0
    """Time since the first measurement. A restarted controller begins at 0."""
    underused_s: float = 0.0
    """Time for which the guard has had free slots although submissions wait."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The wanted replicas, and the reason, for the log."""

    guard: int
    intake: int
    reason: str


def decide_replicas(observed: Observation, rules: Rules) -> Decision:
    """Return the wanted replicas.

    Scale-up is one step to the replicas that the objective needs; loading replicas count. Scale-down is slow. After
    `idle_s` without work the guard goes to its minimum. If that is 0, the first submission starts a replica. Without a
    current measurement nothing changes.
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
    needed = max(minimum, _replicas_for_objective(observed, live, arrivals.rate, rules, rules.headroom))
    peak = _replicas_for_objective(observed, live, arrivals.peak, rules, rules.headroom)
    needed_with_reserve = max(needed, peak, _replicas_to_drain(observed, live, rules))
    if observed.idle_s < rules.idle_s:
        needed_with_reserve = max(needed_with_reserve, min(1, counts.target))
    target, reason = counts.target, "enough replicas"
    if minimum > counts.target and counts.running and observed.underused_s >= _UNDERUSED_S:
        reason = "submissions wait although the guard has free slots; Intake grows instead"
    elif minimum > counts.target:
        target, reason = needed, "the objective needs more replicas"
    elif needed_with_reserve < counts.target:
        reason = "fewer replicas suffice, but not for long enough yet"
        long_enough = observed.measured_for_s >= rules.scale_down_s and _has_elapsed(
            counts.since_scale_up_s, rules.scale_down_s
        )
        if long_enough and _has_elapsed(counts.since_scale_down_s, rules.scale_down_every_s):
            target, reason = needed_with_reserve, "fewer replicas suffice"
    return counts.bounds.clamp(target), reason


def _replicas_for_objective(
    observed: Observation, live: Backlog, rate: float, rules: Rules, headroom: float = 0.0
) -> int:
    """Return the guard replicas that keep each live submission within the objective, and backfill at its own pace.

    Replicas that are requested now judge after a start. Until then the running replicas work on the backlog, and it
    grows by the arrivals that they cannot judge. A submission that arrives at that moment waits behind the whole
    backlog, so the needed rate is (backlog + (arrivals - capacity) * start_s) / wait_budget_s. A submission that waits
    already has also waited for the start. If the objective is shorter than the start,
    both are late, and the backlog is drained within a share of the start.
    """
    replica_rate, start_s = _replica_rate(observed, rules), _start_s(observed, rules)
    capacity, wait_budget_s = observed.guard.running * replica_rate, _WAIT_SHARE * rules.objective_s
    catch_up_s = _CATCH_UP_SHARE * start_s
    sendable = _sendable_backlog(observed, live, rules)
    arriving_at_start = max(0.0, sendable + (rate - capacity) * start_s) / max(wait_budget_s, catch_up_s)
    already_waiting = max(0.0, sendable - capacity * start_s) / max(wait_budget_s - start_s, catch_up_s)
    # No other member can help with a partition later, so the busiest one is planned with half of the objective.
    busiest_partition = min(_guards_per_member(rules) * replica_rate, 2 * live.busiest_partition / rules.objective_s)
    backfill = observed.backfill_peak / rules.backfill_objective_s
    work_rate = max(rate / (1 - headroom), arriving_at_start, already_waiting, busiest_partition) + backfill
    has_work = live.total > 0 or work_rate > 0 or observed.other_calls_at_guard > 0
    replicas = work_rate / replica_rate + observed.other_calls_at_guard / rules.guard_in_flight
    return max(1 if has_work else 0, math.ceil(round(replicas, 6)))


def _decide_intake(observed: Observation, live: Backlog, guard: int, rules: Rules) -> int:
    counts, bounds = observed.intake, observed.intake.bounds
    needed = max(_members_for_guard(guard, rules), _members_for_busiest_partition(observed, live, rules))
    if observed.underused_s >= _UNDERUSED_S and _has_elapsed(counts.since_scale_up_s, _UNDERUSED_S):
        needed = max(needed, counts.target + max(1, counts.target // 2))
    maximum = min(bounds.maximum, live.partitions) if live.partitions else bounds.maximum
    long_enough = (
        observed.measured_for_s >= rules.scale_down_s
        and _has_elapsed(counts.since_scale_up_s, 2 * rules.scale_down_s)
        and _has_elapsed(counts.since_scale_down_s, rules.scale_down_s)
    )
    may_shrink = needed <= _INTAKE_SHRINK_SHARE * counts.target and long_enough and not counts.loading
    target = needed if may_shrink else max(needed, counts.target)
    return max(1, bounds.minimum, min(maximum, target))


def _members_for_guard(guard: int, rules: Rules) -> int:
    """Return the intake members that keep that many guard replicas busy."""
    return math.ceil(INTAKE_OVERSUBSCRIPTION * guard * rules.guard_in_flight / rules.intake_in_flight)


def _members_for_busiest_partition(observed: Observation, live: Backlog, rules: Rules) -> int:
    """Return the members with which the busiest partition is judged in time.

    With fewer members than partitions, a member works on several partitions. The other partitions of its member must
    not make the busiest one late.
    """
    if live.partitions <= 1 or live.busiest_partition <= 0:
        return 0
    judged_in_time = _guards_per_member(rules) * _replica_rate(observed, rules) * rules.objective_s / 2
    mean_of_others = (live.total - live.busiest_partition) / (live.partitions - 1)
    others = (judged_in_time - live.busiest_partition) / mean_of_others if mean_of_others > 0 else live.partitions
    partitions_per_member = 1 + max(0, math.floor(min(others, live.partitions)))
    return math.ceil(live.partitions / partitions_per_member)


def _replicas_to_drain(observed: Observation, live: Backlog, rules: Rules) -> int:
    """Return the guard replicas that drain the backlog in time. Replicas that are removed now do not help with it."""
    work_rate = _sendable_backlog(observed, live, rules) / (_WAIT_SHARE * rules.objective_s)
    return math.ceil(round(work_rate / _replica_rate(observed, rules), 6))


def _sendable_backlog(observed: Observation, live: Backlog, rules: Rules) -> float:
    """Return the live backlog that Intake can send to the guard within the objective.

    One member works on a partition, so more than that member can send in time does not count.
    """
    limit = _guards_per_member(rules) * _replica_rate(observed, rules) * rules.objective_s
    if live.busiest_partition <= limit:
        return live.total
    return live.total - sum(each - limit for each in live.by_partition.values() if each > limit)


def _replica_rate(observed: Observation, rules: Rules) -> float:
    return observed.replica_rate or rules.replica_rate


def _start_s(observed: Observation, rules: Rules) -> float:
    return rules.start_s if observed.start_s is None else observed.start_s


def _guards_per_member(rules: Rules) -> float:
    """Return how many guard replicas one intake member can keep busy."""
    return max(1.0, rules.intake_in_flight / rules.guard_in_flight)


def _has_elapsed(since_s: float | None, duration_s: float) -> bool:
    return since_s is None or since_s >= duration_s

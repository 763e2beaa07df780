"""How many replicas the backlog needs: a pure function, what it has to measure, and a thin wrapper for Ray Serve.

`decide` takes what is known and returns the wanted replicas of Guard and Intake. `Measurements` makes rates of the
readings that come in. `BacklogScaling` is the application-level autoscaling policy of Ray Serve 2.60 around the two; it
runs on the loop of Serve's controller. Serve pickles this module by value, so it imports nothing but the standard
library, and nothing here blocks or raises.

**What Intake has to record** in `record_autoscaling_stats`, each replica on its own. Always return a dict, the first
time too (Serve switches the recording off for good otherwise); values are numbers. `live` is the stream of submissions,
`backfill` that of backfill.

- `live_backlog` (messages): published and not settled, of the whole group.
- `live_published` (messages): ever published, a count that only grows, of the same reading as `live_backlog`. Kafka:
  the sum of the end offsets; Redis Streams: `entries-added`.
- `live_partitions` (partitions): of the stream; 0 on Redis Streams, where every member may take every message.
- `live_backlog_<n>` (messages): published and not settled in partition n, for the busiest partitions that this member
  holds; none on Redis Streams.
- `backfill_backlog`, `backfill_published` (messages): likewise; left out where no backfill is read.
- `at_guard` (submissions): what this member has given to the guard and has no answer for, also what waits for one.

Other deployments that call the guard, such as Gateway, record `at_guard` as well.

What cannot be read is left out, never recorded as 0: while the broker is away `record_autoscaling_stats` returns only
`at_guard`. Several members may report the same thing; the newest point counts, so their clocks should agree to a
second. While Guard has no replica, Intake keeps what it holds and goes on recording.

**What the deployments have to set**: an `autoscaling_config` on both (see `serve_options`), without which Serve neither
records nor scales, and an `AutoscalingPolicy` for the application with
`policy_function="pipelines.autoscaling.serve_policy:BacklogScaling"` and the fields of `Rules` as `policy_kwargs`.
Serve's own delays are 0: waiting is decided here.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final

_RATE_WINDOW_S: Final = 60.0
"""Over how long the rate of arrivals is measured."""
_BURST_WINDOW_SHARE, _BURST_WINDOW_S = 0.05, (3.0, 30.0)
"""A rate measured over this share of the objective, within these seconds, counts at once if it is not chance."""
_BURST_DEVIATIONS: Final = 3.0
"""Standard deviations of a Poisson count: beyond them it is not chance."""
_MIN_READING_INTERVAL_S: Final = 0.8
"""At least, between two readings that are remembered: of those that come every second none is left out."""
_SATURATED_SHARE, _SATURATED_S = 1.0, 10.0
"""The guard's rate is believed when this share of its places was taken for so long."""
_UNDERUSED_SHARE, _UNDERUSED_S = 0.5, 60.0
"""When no more than this share of its places was taken for so long, although something waits, the guard is not what is
slow."""
_RATE_EMA_WEIGHT: Final = 0.3
"""Weight of a new measurement against what was known."""
_START_EMA_WEIGHT: Final = 0.05
_WAIT_SHARE: Final = 0.64
"""Share of the objective that a submission may wait; the rest is for what was not foreseen."""
_CATCH_UP_SHARE: Final = 0.25
"""Share of a start within which a backlog is drained whose objective is lost, because it is shorter than the start."""
INTAKE_OVERSUBSCRIPTION: Final = 1.25
"""Intake works on so many times what the guard does, so that the next ones are at hand."""
_PARTITION_PREFIX: Final = "live_backlog_"
_INTAKE_SHRINK_SHARE: Final = 0.7
"""Intake shrinks only to at most this share: each change moves partitions."""

log = logging.getLogger("ray.serve")


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
    def busiest(self) -> float:
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
    why: str


def decide(seen: Observation, rules: Rules) -> Decision:
    """The wanted replicas.

    Up in one step to what the objective needs, replicas that are still loading counted; down slowly; to zero when
    nothing has come for a while, and up from it with the first submission. What is not known changes nothing.
    """
    if seen.live is None or seen.arrivals is None:
        intake = max(1, seen.intake.bounds.clamp(seen.intake.target))
        return Decision(
            seen.guard.bounds.clamp(seen.guard.target), intake, "no current measurement, so nothing changes"
        )
    guard, why = _guard(seen, seen.live, seen.arrivals, rules)
    return Decision(guard, _intake(seen, seen.live, guard, rules), why)


def _guard(seen: Observation, live: Backlog, arrivals: Arrivals, rules: Rules) -> tuple[int, str]:
    counts = seen.guard
    minimum = _replicas_for_objective(seen, live, arrivals.rate, rules)
    desired = max(minimum, _replicas_for_objective(seen, live, arrivals.rate, rules, rules.headroom))
    peak = _replicas_for_objective(seen, live, arrivals.peak, rules, rules.headroom)
    retained = max(desired, peak, _replicas_to_drain(seen, live, rules))
    if seen.idle_s < rules.idle_s:
        retained = max(retained, min(1, counts.target))
    target, why = counts.target, "enough replicas"
    if minimum > counts.target and counts.running and seen.underused_s >= _UNDERUSED_S:
        why = "guard is not the bottleneck"
    elif minimum > counts.target:
        target, why = desired, "the objective needs more replicas"
    elif retained < counts.target:
        why = "fewer replicas suffice, but not for long enough yet"
        long_enough = seen.measured_for_s >= rules.scale_down_s and _has_elapsed(
            counts.since_scale_up_s, rules.scale_down_s
        )
        if long_enough and _has_elapsed(counts.since_scale_down_s, rules.scale_down_every_s):
            target, why = retained, "fewer replicas suffice"
    return counts.bounds.clamp(target), why


def _replicas_for_objective(seen: Observation, live: Backlog, rate: float, rules: Rules, headroom: float = 0.0) -> int:
    """Guard replicas that keep every live submission within the objective, and backfill at its pace.

    Those that are asked for now judge after `start` seconds. Until then the running ones work on the backlog, and it
    grows by what they cannot do. Whoever comes just then waits behind all of it; whoever waits already also waits for
    the start. For an objective shorter than the start these are lost, and the backlog is drained as fast as a part of
    the start.
    """
    one, start_s = _replica_rate(seen, rules), _start_s(seen, rules)
    capacity, wait_budget_s = seen.guard.running * one, _WAIT_SHARE * rules.objective_s
    assignable = _assignable_backlog(seen, live, rules)
    at_start = max(0.0, assignable + (rate - capacity) * start_s) / max(wait_budget_s, _CATCH_UP_SHARE * start_s)
    already = max(0.0, assignable - capacity * start_s) / max(wait_budget_s - start_s, _CATCH_UP_SHARE * start_s)
    # Nobody can help that member later, so the busiest partition has half of the objective.
    busiest = min(_guards_per_member(rules) * one, 2 * live.busiest / rules.objective_s)
    backfill = seen.backfill_peak / rules.backfill_objective_s
    work = max(rate / (1 - headroom), at_start, already, busiest) + backfill
    anything = live.total > 0 or work > 0 or seen.active_callers > 0
    replicas = work / one + seen.active_callers / rules.guard_in_flight
    return max(1 if anything else 0, math.ceil(round(replicas, 6)))


def _intake(seen: Observation, live: Backlog, guard: int, rules: Rules) -> int:
    """Members that keep the guard busy, and do not let the busiest partition share one if that makes it late."""
    counts = seen.intake
    desired = math.ceil(INTAKE_OVERSUBSCRIPTION * guard * rules.guard_in_flight / rules.intake_in_flight)
    if live.partitions > 1 and live.busiest > 0:
        in_time = _guards_per_member(rules) * _replica_rate(seen, rules) * rules.objective_s / 2
        another = (live.total - live.busiest) / (live.partitions - 1)
        beside = (in_time - live.busiest) / another if another > 0 else live.partitions
        desired = max(desired, math.ceil(live.partitions / (1 + max(0, math.floor(min(beside, live.partitions))))))
    if seen.underused_s >= _UNDERUSED_S and _has_elapsed(counts.since_scale_up_s, _UNDERUSED_S):
        desired = max(desired, counts.target + max(1, counts.target // 2))
    most = min(counts.bounds.maximum, live.partitions) if live.partitions else counts.bounds.maximum
    target = max(1, counts.bounds.minimum, min(most, max(desired, counts.target)))
    settled = _has_elapsed(counts.since_scale_up_s, 2 * rules.scale_down_s) and _has_elapsed(
        counts.since_scale_down_s, rules.scale_down_s
    )
    long_enough = settled and seen.measured_for_s >= rules.scale_down_s
    if desired <= _INTAKE_SHRINK_SHARE * counts.target and long_enough and not counts.loading:
        target = max(1, counts.bounds.minimum, min(most, desired))
    return target


def _replicas_to_drain(seen: Observation, live: Backlog, rules: Rules) -> int:
    """Guard replicas that work off in time what waits: those that go now do not help with it."""
    work = _assignable_backlog(seen, live, rules) / (_WAIT_SHARE * rules.objective_s)
    return math.ceil(round(work / _replica_rate(seen, rules), 6))


def _assignable_backlog(seen: Observation, live: Backlog, rules: Rules) -> float:
    """The live backlog; of a partition's no more than the one member that works it can give to the guard in time."""
    most = _guards_per_member(rules) * _replica_rate(seen, rules) * rules.objective_s
    if live.busiest <= most:
        return live.total
    return live.total - sum(each - most for each in live.by_partition.values() if each > most)


def _replica_rate(seen: Observation, rules: Rules) -> float:
    return seen.replica_rate or rules.replica_rate


def _start_s(seen: Observation, rules: Rules) -> float:
    return rules.start_s if seen.start_s is None else seen.start_s


def _guards_per_member(rules: Rules) -> float:
    """How many guard replicas one intake member can keep busy."""
    return max(1.0, rules.intake_in_flight / rules.guard_in_flight)


def _has_elapsed(since_s: float | None, duration_s: float) -> bool:
    return since_s is None or since_s >= duration_s


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at the streams and the guard."""

    at_s: float
    """When, in seconds since any epoch."""
    live: Backlog
    live_published: float
    backfill: float = 0.0
    backfill_published: float = 0.0
    at_guard: float | None = None
    """Submissions that the guard has; None: not known."""


class Measurements:
    """What readings, one after the other, say about rates and times. Deterministic: it looks at no clock."""

    def __init__(self, rules: Rules) -> None:
        self.replica_rate: float | None = None
        self.start_s: float | None = None
        self.backfill_peak = 0.0
        self.last_decision_s: float | None = None
        """When a decision was last made, for whoever makes it."""
        self._rules = rules
        self._readings: deque[tuple[float, float]] = deque()
        """When, and how many live messages had been published."""
        self._rates: deque[tuple[float, float]] = deque()
        self._first_reading_s: float | None = None
        self._last_active_s: float | None = None
        self._underused_since_s: float | None = None
        self._saturated_since: tuple[float, float, int] | None = None
        """When, how many had been settled, running replicas."""
        self._requested_at_s: deque[float] = deque()
        """When each replica that still loads was asked for."""
        self._running = 0

    def record_reading(self, reading: Reading, guard: ReplicaCounts) -> None:
        """Take in a reading. One that is not newer than the last one says nothing."""
        if self._readings and reading.at_s < self._readings[-1][0] + _MIN_READING_INTERVAL_S:
            return
        if self._first_reading_s is None:
            self._first_reading_s = reading.at_s
        if self._readings and reading.live_published < self._readings[-1][1]:
            self._readings.clear()  # the stream was made anew
            self._saturated_since = None
        self._readings.append((reading.at_s, reading.live_published))
        while self._readings[0][0] < reading.at_s - 2 * _RATE_WINDOW_S:
            self._readings.popleft()
        arrived = len(self._readings) > 1 and self._readings[-1][1] > self._readings[-2][1]
        if arrived or reading.live.total > 0 or reading.backfill > 0 or self._last_active_s is None:
            self._last_active_s = reading.at_s
        self.backfill_peak = max(self.backfill_peak, reading.backfill) if reading.backfill else 0.0
        self._record_arrival_rate(reading.at_s)
        self._measure_replica_rate(reading, guard.running)

    def record_replicas(self, now_s: float, guard: ReplicaCounts) -> None:
        """See which replicas have come, and learn from it how long they take."""
        came, self._running = guard.running - self._running, guard.running
        while len(self._requested_at_s) > guard.loading:
            if came > 0:
                took_s, came = now_s - self._requested_at_s.popleft(), came - 1
                self.start_s = (
                    took_s if self.start_s is None else self.start_s + _START_EMA_WEIGHT * (took_s - self.start_s)
                )
            else:
                self._requested_at_s.pop()
        while len(self._requested_at_s) < guard.loading:
            self._requested_at_s.append(now_s)

    def record_activity(self, at_s: float) -> None:
        """Somebody else had something for the guard."""
        self._last_active_s = at_s

    def observe(
        self,
        now_s: float,
        guard: ReplicaCounts,
        intake: ReplicaCounts,
        live: Backlog | None,
        active_callers: float = 0.0,
    ) -> Observation:
        """All that is known now."""
        return Observation(
            guard=guard,
            intake=intake,
            live=live,
            arrivals=self._arrivals(),
            backfill_peak=self.backfill_peak,
            replica_rate=self.replica_rate,
            start_s=self.start_s,
            active_callers=active_callers,
            idle_s=0.0 if self._last_active_s is None else now_s - self._last_active_s,
            measured_for_s=0.0 if self._first_reading_s is None else now_s - self._first_reading_s,
            underused_s=0.0 if self._underused_since_s is None else now_s - self._underused_since_s,
        )

    def _arrivals(self) -> Arrivals | None:
        steady = self._arrival_rate(_RATE_WINDOW_S)
        if steady is None:
            return None
        rate = steady[0]
        fast = self._arrival_rate(
            max(_BURST_WINDOW_S[0], min(_BURST_WINDOW_S[1], _BURST_WINDOW_SHARE * self._rules.objective_s))
        )
        if fast and fast[0] - _BURST_DEVIATIONS * math.sqrt(fast[0] / fast[1]) > rate:
            rate = fast[0]
        return Arrivals(rate=rate, peak=max((rate for _, rate in self._rates), default=rate))

    def _arrival_rate(self, window_s: float) -> tuple[float, float] | None:
        """Live submissions a second over the last `window_s`, and over how many seconds that really is."""
        if len(self._readings) < 2:
            return None
        at_s, published = self._readings[-1]
        since_s, before = next(
            (each for each in reversed(self._readings) if each[0] <= at_s - window_s), self._readings[0]
        )
        return (published - before) / (at_s - since_s), at_s - since_s

    def _record_arrival_rate(self, at_s: float) -> None:
        steady = self._arrival_rate(_RATE_WINDOW_S)
        if steady and (not self._rates or at_s >= self._rates[-1][0] + _RATE_WINDOW_S / 6):
            self._rates.append((at_s, steady[0]))
        while self._rates and self._rates[0][0] < at_s - self._rules.scale_down_s:
            self._rates.popleft()

    def _measure_replica_rate(self, reading: Reading, running: int) -> None:
        places = running * self._rules.guard_in_flight
        if reading.at_guard is None or not places:
            self._saturated_since = self._underused_since_s = None
            return
        waiting = reading.live.total + reading.backfill
        if reading.at_guard > _UNDERUSED_SHARE * places or waiting < places:
            self._underused_since_s = None
        elif self._underused_since_s is None:
            self._underused_since_s = reading.at_s
        settled = reading.live_published + reading.backfill_published - waiting
        since = self._saturated_since
        if reading.at_guard < _SATURATED_SHARE * places or since is None or since[2] != running:
            self._saturated_since = (
                (reading.at_s, settled, running) if reading.at_guard >= _SATURATED_SHARE * places else None
            )
        elif reading.at_s >= since[0] + _SATURATED_S:
            rate = (settled - since[1]) / (reading.at_s - since[0]) / running
            if rate > 0:  # else something is away, not slow
                self.replica_rate = (
                    rate if not self.replica_rate else self.replica_rate + _RATE_EMA_WEIGHT * (rate - self.replica_rate)
                )
            self._saturated_since = (reading.at_s, settled, running)


class BacklogScaling:
    """Ray Serve's application-level policy: `{DeploymentID: AutoscalingContext} -> ({DeploymentID: n}, state)`.

    Never blocks, never raises: on any fault the present state is held, and the log says so once until it is over.
    While no guard replica is wanted, Serve itself starts one if a call waits at a handle.
    """

    def __init__(self, guard: str = "Guard", intake: str = "Intake", **rules: float) -> None:
        """`guard`, `intake`: names of the deployments; `rules`: fields of `Rules`, unknown ones are ignored."""
        self._names = (guard, intake)
        self._rules = Rules(**{each.name: rules[each.name] for each in fields(Rules) if each.name in rules})  # type: ignore[arg-type]  # JSON numbers
        self._fault = ""

    def __call__(self, contexts: Mapping[Any, Any]) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
        """Serve calls this several times a second; nothing is returned for a deployment that keeps what it has."""
        state = {each: dict(context.policy_state) for each, context in contexts.items()}
        try:
            decisions = self._decide(contexts, state)
            fault = ""
        except Exception as error:  # noqa: BLE001 - a policy that raises stalls Serve's controller
            decisions, fault = {}, f"{type(error).__name__}: {error}"
        if fault and not self._fault:
            log.error("cannot decide on replicas; keeping the present ones and deciding again in a second: %s", fault)
        self._fault = fault
        return decisions, state

    def _decide(self, contexts: Mapping[Any, Any], state: dict[Any, dict[str, Any]]) -> dict[Any, int]:
        by_name = {context.deployment_name: each for each, context in contexts.items()}
        missing = [name for name in self._names if name not in by_name]
        if missing:
            raise LookupError(f"deployment {missing[0]} has no autoscaling_config")
        guard_id, intake_id = (by_name[name] for name in self._names)
        measured: Measurements = state[guard_id].setdefault("measurements", Measurements(self._rules))
        now_s = contexts[guard_id].current_time or time.time()
        if measured.last_decision_s is not None and 0 <= now_s - measured.last_decision_s < self._rules.every_s:
            return {}
        measured.last_decision_s = now_s
        guard, intake = (replica_counts(contexts[each], now_s) for each in (guard_id, intake_id))
        oldest_s = now_s - self._rules.stale_s
        reading = read(contexts[intake_id].raw_metrics or {}, oldest_s)
        others = [context for each, context in contexts.items() if each not in (guard_id, intake_id)]
        active_callers = sum(at_guard(context.raw_metrics or {}, oldest_s) or 0.0 for context in others)
        measured.record_replicas(now_s, guard)
        if reading:
            measured.record_reading(reading, guard)
        if contexts[guard_id].total_num_requests > 0:
            measured.record_activity(now_s)
        live = reading.live if reading else None
        decision = decide(measured.observe(now_s, guard, intake, live, active_callers), self._rules)
        if not guard.running and decision.guard:
            # With calls waiting at a handle Serve would start a single replica, whatever is returned here.
            vars(contexts[guard_id])["total_num_requests"] = 0.0
        if (decision.guard, decision.intake) != (guard.target, intake.target):
            log.info(
                "guard %d -> %d, intake %d -> %d: %s",
                *(guard.target, decision.guard, intake.target, decision.intake, decision.why),
            )
        return {guard_id: decision.guard, intake_id: decision.intake}


def replica_counts(context: Any, now_s: float) -> ReplicaCounts:
    """What Serve's context of a deployment says about its replicas."""
    up_s, down_s = context.last_scale_up_time, context.last_scale_down_time
    return ReplicaCounts(
        running=context.current_num_replicas,
        target=context.target_num_replicas,
        bounds=ReplicaBounds(context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas),
        since_scale_up_s=None if up_s is None else now_s - up_s,
        since_scale_down_s=None if down_s is None else now_s - down_s,
    )


def read(metrics: Mapping[str, Mapping[Any, Sequence[Any]]], oldest_s: float) -> Reading | None:
    """The newest numbers that Intake's replicas have recorded; None where they are missing or older than `oldest_s`.

    `metrics` is `raw_metrics` of Serve's context: by name and replica, points with `timestamp` and `value`.
    """
    live = _newest(metrics, "live", oldest_s)
    if live is None or not all(map(math.isfinite, live[1:3])):
        return None
    at_s, waiting, published, replica = live
    backfill = _newest(metrics, "backfill", oldest_s)
    by_partition: dict[int, float] = {}
    for name, series in metrics.items():
        if name.startswith(_PARTITION_PREFIX):
            newest_s = oldest_s
            for points in series.values():  # mostly one
                if points and points[-1].timestamp >= newest_s:
                    newest_s = points[-1].timestamp
                    by_partition[int(name[len(_PARTITION_PREFIX) :])] = points[-1].value
    partitions = metrics.get("live_partitions", {}).get(replica)
    return Reading(
        at_s=at_s,
        live=Backlog(waiting, by_partition, int(partitions[-1].value) if partitions else 0),
        live_published=published,
        backfill=backfill[1] if backfill else 0.0,
        backfill_published=backfill[2] if backfill else 0.0,
        at_guard=at_guard(metrics, oldest_s),
    )


def at_guard(metrics: Mapping[str, Mapping[Any, Sequence[Any]]], oldest_s: float) -> float | None:
    """Submissions that the replicas of a deployment have at the guard; None where none says so."""
    newest = [each[-1] for each in metrics.get("at_guard", {}).values() if each]
    values = [point.value for point in newest if point.timestamp >= oldest_s]
    return float(sum(values)) if values else None


def _newest(
    metrics: Mapping[str, Mapping[Any, Sequence[Any]]], stream: str, oldest_s: float
) -> tuple[float, float, float, Any] | None:
    """When, waiting, published, by which replica: the newest reading of a stream."""
    published = metrics.get(f"{stream}_published", {})
    found = None
    for replica, series in metrics.get(f"{stream}_backlog", {}).items():
        if series and published.get(replica) and series[-1].timestamp >= max(oldest_s, found[0] if found else oldest_s):
            found = (series[-1].timestamp, series[-1].value, published[replica][-1].value, replica)
    return found


def serve_options(bounds: ReplicaBounds, report_s: float = 10.0) -> dict[str, float]:
    """The `autoscaling_config` of a deployment that `BacklogScaling` decides about; it reports every `report_s`."""
    return {
        "min_replicas": bounds.minimum,
        "max_replicas": bounds.maximum,
        "upscale_delay_s": 0,
        "downscale_delay_s": 0,
        "downscale_to_zero_delay_s": 0,
        # Deprecated for an environment variable that Serve 2.60 defines and does not read.
        "metrics_interval_s": report_s,
        "look_back_period_s": 1.2 * report_s,  # Serve wants more than the interval; the newest point is all that counts
    }

"""Rates and durations, measured from a series of readings of the streams and the guard."""

import math
from collections import deque
from dataclasses import dataclass
from typing import Final

from pipelines.autoscaling.replica_decision import Arrivals, Backlog, Observation, ReplicaCounts, Rules

_RATE_WINDOW_S: Final = 60.0
"""The steady rate of arrivals is measured over this time."""
_BURST_WINDOW_SHARE: Final = 0.05
"""A burst is measured over this share of the objective. A burst is a rate above what chance makes of a steady one:
steady arrivals are a Poisson process, whose count over a time varies by its square root."""
_MIN_BURST_WINDOW_S: Final = 3.0
_MAX_BURST_WINDOW_S: Final = 30.0
_BURST_DEVIATIONS: Final = 3.0
"""A burst counts if it is beyond this many standard deviations of a Poisson count."""
_MIN_READING_INTERVAL_S: Final = 0.8
"""Readings closer together than this are ignored. It is a little less than a second, the time between two reports."""
_SATURATED_SHARE: Final = 1.0
"""A guard replica's rate is measured while this share of the guard's slots is taken."""
_SATURATED_S: Final = 10.0
"""Time over which a guard replica's rate is measured."""
_UNDERUSED_SHARE: Final = 0.5
"""The guard counts as underused while at most this share of its slots is taken although submissions wait."""
_RATE_EMA_WEIGHT: Final = 0.3
"""Weight of a new measurement in the moving average of a replica's rate."""
_START_EMA_WEIGHT: Final = 0.05
"""Weight of a new measurement in the moving average of a replica's start."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The state of the streams and the guard at one moment."""

    at_s: float
    """Seconds since any epoch."""
    live: Backlog
    live_published: float
    backfill: float = 0.0
    backfill_published: float = 0.0
    at_guard: float | None = None
    """Submissions that the guard has; None if nothing recorded them."""


class Measurements:
    """Measures rates and times from a series of readings. It uses no clock."""

    def __init__(self, rules: Rules) -> None:
        self.replica_rate: float | None = None
        self.start_s: float | None = None
        self.backfill_peak = 0.0
        self.last_decision_s: float | None = None
        """The time of the last decision. `BacklogScaling` sets it: Serve keeps only this object between its calls."""
        self._rules = rules
        self._readings: deque[tuple[float, float]] = deque()
        """Pairs of the time and the live messages published until then."""
        self._rates: deque[tuple[float, float]] = deque()
        self._first_reading_s: float | None = None
        self._last_active_s: float | None = None
        self._underused_since_s: float | None = None
        self._saturated_since: tuple[float, float, int] | None = None
        """The time, the messages settled until then, and the running replicas."""
        self._requested_at_s: deque[float] = deque()
        """The time at which each replica that still loads was requested."""
        self._running = 0

    def record_reading(self, reading: Reading, guard: ReplicaCounts) -> None:
        """Add a reading. A reading that is not newer than the last one is ignored."""
        if self._readings and reading.at_s < self._readings[-1][0] + _MIN_READING_INTERVAL_S:
            return
        if self._first_reading_s is None:
            self._first_reading_s = reading.at_s
        if self._readings and reading.live_published < self._readings[-1][1]:
            self._readings.clear()  # the stream was deleted and created again
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
        """Measure the start of the replicas that are new since the last call."""
        started, self._running = guard.running - self._running, guard.running
        while len(self._requested_at_s) > guard.loading:
            if started > 0:
                took_s, started = now_s - self._requested_at_s.popleft(), started - 1
                self.start_s = _update_average(self.start_s, took_s, _START_EMA_WEIGHT)
            else:
                self._requested_at_s.pop()
        while len(self._requested_at_s) < guard.loading:
            self._requested_at_s.append(now_s)

    def record_activity(self, at_s: float) -> None:
        """Note that a deployment other than Intake has called the guard."""
        self._last_active_s = at_s

    def observe(
        self,
        now_s: float,
        guard: ReplicaCounts,
        intake: ReplicaCounts,
        live: Backlog | None,
        other_calls_at_guard: float = 0.0,
    ) -> Observation:
        """Return the measurements of this moment."""
        return Observation(
            guard=guard,
            intake=intake,
            live=live,
            arrivals=self._arrivals(),
            backfill_peak=self.backfill_peak,
            replica_rate=self.replica_rate,
            start_s=self.start_s,
            other_calls_at_guard=other_calls_at_guard,
            idle_s=0.0 if self._last_active_s is None else now_s - self._last_active_s,
            measured_for_s=0.0 if self._first_reading_s is None else now_s - self._first_reading_s,
            underused_s=0.0 if self._underused_since_s is None else now_s - self._underused_since_s,
        )

    def _arrivals(self) -> Arrivals | None:
        steady = self._arrival_rate(_RATE_WINDOW_S)
        if steady is None:
            return None
        rate, _ = steady
        window_s = max(_MIN_BURST_WINDOW_S, min(_MAX_BURST_WINDOW_S, _BURST_WINDOW_SHARE * self._rules.objective_s))
        if burst := self._arrival_rate(window_s):
            burst_rate, seconds = burst
            if burst_rate - _BURST_DEVIATIONS * math.sqrt(burst_rate / seconds) > rate:
                rate = burst_rate
        return Arrivals(rate=rate, peak=max((rate for _, rate in self._rates), default=rate))

    def _arrival_rate(self, window_s: float) -> tuple[float, float] | None:
        """Return the live submissions a second over the last `window_s`, and the seconds that the readings cover."""
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
        slots = running * self._rules.guard_in_flight
        if reading.at_guard is None or not slots:
            self._saturated_since = self._underused_since_s = None
            return
        waiting = reading.live.total + reading.backfill
        if reading.at_guard > _UNDERUSED_SHARE * slots or waiting < slots:
            self._underused_since_s = None
        elif self._underused_since_s is None:
            self._underused_since_s = reading.at_s
        settled = reading.live_published + reading.backfill_published - waiting
        now = (reading.at_s, settled, running)
        if reading.at_guard < _SATURATED_SHARE * slots:
            self._saturated_since = None
        elif self._saturated_since is None or self._saturated_since[2] != running:
            self._saturated_since = now
        elif reading.at_s >= self._saturated_since[0] + _SATURATED_S:
            since_s, settled_before, _ = self._saturated_since
            rate = (settled - settled_before) / (reading.at_s - since_s) / running
            if rate > 0:  # at 0 a backend is down, and the guard is not slow
                self.replica_rate = _update_average(self.replica_rate, rate, _RATE_EMA_WEIGHT)
            self._saturated_since = now


def _update_average(average: float | None, value: float, weight: float) -> float:
    return value if average is None else average + weight * (value - average)

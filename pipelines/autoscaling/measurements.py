"""Rates and durations, measured from one reading of the streams and the guard after the other."""

import math
from collections import deque
from dataclasses import dataclass
from typing import Final

from pipelines.autoscaling.decision import Arrivals, Backlog, Observation, ReplicaCounts, Rules

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
_UNDERUSED_SHARE: Final = 0.5
"""The guard counts as underused while at most this share of its slots is taken although submissions wait."""
_RATE_EMA_WEIGHT: Final = 0.3
"""Weight of a new measurement against what was known."""
_START_EMA_WEIGHT: Final = 0.05


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

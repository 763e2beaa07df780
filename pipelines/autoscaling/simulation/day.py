"""Simulates a day with one way of scaling, second by second."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.autoscaling.replica_decision import INTAKE_OVERSUBSCRIPTION
from pipelines.autoscaling.simulation.cluster import ClusterSpec, SimulatedFleet
from pipelines.autoscaling.simulation.load import WARM_UP_S, ArrivalCounts
from pipelines.autoscaling.simulation.scalers import ClusterView, Scaler

_METRICS_AGE_S = 2
"""Age of the numbers that a scaler reads."""
MINUTE_S = 60


@dataclass(frozen=True)
class SimulatedDay:
    """The result of one day, without the warm-up."""

    waits_s: npt.NDArray[np.float64]
    """Time from submission to verdict of the last submission of each second."""
    arrived: ArrivalCounts
    replicas: npt.NDArray[np.int64]
    target: npt.NDArray[np.int64]
    backlog: npt.NDArray[np.float64]
    gpu_hours: float
    actions: int
    lost: int

    def percentile_s(self, share: float) -> float:
        """Return a percentile of the waits of all submissions."""
        return weighted_percentile(self.waits_s, self.arrived, share)

    def p99_by_minute_s(self) -> npt.NDArray[np.float64]:
        """Return the p99 of the waits for each minute; 0 for a minute without submissions."""
        waits, arrived = self.waits_s.reshape(-1, MINUTE_S), self.arrived.reshape(-1, MINUTE_S)
        return np.array([weighted_percentile(w, a, 0.99) for w, a in zip(waits, arrived, strict=True)])


def weighted_percentile(values: npt.NDArray[np.float64], weights: ArrivalCounts, share: float) -> float:
    """Return the smallest value that `share` of the weights does not exceed, or 0 if all weights are 0."""
    order = np.argsort(values)
    cumulative = np.cumsum(weights[order])
    if not len(cumulative) or cumulative[-1] == 0:
        return 0.0
    return float(values[order[np.searchsorted(cumulative, share * cumulative[-1])]])


def simulate_day(arrivals: ArrivalCounts, scaler: Scaler, cluster: ClusterSpec, seed: int) -> SimulatedDay:
    """Simulate the warm-up and the day. Submissions are judged in order, and all partitions are equal."""
    simulation = _Simulation(arrivals, scaler, cluster, seed)
    for second in range(len(arrivals)):
        simulation.step(second)
    return simulation.finish()


class _Metrics(NamedTuple):
    """The numbers that a scaler reads, in the order of `ClusterView`."""

    at_s: int
    backlog: float
    published: float
    at_guard: float


class _Simulation:
    """The state of one simulated day."""

    def __init__(self, arrivals: ArrivalCounts, scaler: Scaler, cluster: ClusterSpec, seed: int) -> None:
        seconds = len(arrivals)
        self._arrivals, self._scaler, self._cluster = arrivals, scaler, cluster
        self._fleet = SimulatedFleet(cluster, np.random.default_rng(seed + 1_000_003))
        self._published = np.concatenate([[0], np.cumsum(arrivals)]).astype(float)
        self._settled = np.zeros(seconds + 1)
        self._replicas, self._target = np.zeros(seconds, np.int64), np.zeros(seconds, np.int64)
        self._done = 0.0
        """Submissions judged so far; a lost replica takes some back."""
        self._intake_capacity = _intake_capacity(scaler, cluster)
        self._metrics = _Metrics(0, 0.0, 0.0, 0.0)
        """The numbers that the scaler reads next."""
        self._warm_up_gpu_s, self._warm_up_changes = 0.0, 0

    def step(self, second: int) -> None:
        """Simulate one second."""
        fleet, cluster = self._fleet, self._cluster
        fleet.advance(second)
        if second == WARM_UP_S:
            self._warm_up_gpu_s, self._warm_up_changes = fleet.gpu_s, fleet.changes
        slots = fleet.running * cluster.guard_in_flight
        lost = fleet.lose_nodes(1.0) * cluster.guard_in_flight
        self._done -= min(lost, max(0.0, self._published[second] - self._done))
        fed_replicas = min(fleet.running, self._intake_capacity // cluster.guard_in_flight)
        capacity = fed_replicas * cluster.replica_rate
        judged = min(self._published[second + 1] - self._done, capacity)
        self._done += judged
        self._settled[second + 1] = self._done
        self._replicas[second], self._target[second] = fleet.running, fleet.target
        busy = judged / capacity * slots if capacity else 0.0
        self._scale(second, waiting=self._published[second + 1] - self._done, busy=busy)

    def _scale(self, second: int, waiting: float, busy: float) -> None:
        """Record the numbers when they are due, and let the scaler act on the recorded ones."""
        fleet, interval_s = self._fleet, self._scaler.interval_s
        if (second + _METRICS_AGE_S) % interval_s == 0:
            at_guard = min(busy + waiting, self._intake_capacity)
            self._metrics = _Metrics(second, waiting + busy, self._published[second + 1], at_guard)
        if second % interval_s == 0 and second >= _METRICS_AGE_S:
            view = ClusterView(
                *self._metrics, fleet.running, fleet.target, fleet.scaled_up_at_s, fleet.scaled_down_at_s
            )
            fleet.set_target(self._scaler.decide(view))

    def finish(self) -> SimulatedDay:
        """Return the result of the day that followed the warm-up."""
        seconds = len(self._arrivals)
        self._fleet.advance(seconds)
        settled = np.maximum.accumulate(self._settled)
        settled_at_s = np.searchsorted(settled[1:], self._published[1:] - 1e-6)
        waits_s = np.maximum(0, settled_at_s - np.arange(seconds)) + self._cluster.service_s
        day = slice(WARM_UP_S, None)
        return SimulatedDay(
            waits_s=waits_s[day].astype(float),
            arrived=self._arrivals[day],
            replicas=self._replicas[day],
            target=self._target[day],
            backlog=(self._published[1:] - settled[1:])[day],
            gpu_hours=(self._fleet.gpu_s - self._warm_up_gpu_s) / 3600,
            actions=self._fleet.changes - self._warm_up_changes,
            lost=self._fleet.lost,
        )


def _intake_capacity(scaler: Scaler, cluster: ClusterSpec) -> float:
    """Return how many submissions Intake can hold."""
    if scaler.intake_members is None:
        return INTAKE_OVERSUBSCRIPTION * cluster.max_replicas * cluster.guard_in_flight
    return scaler.intake_members * cluster.intake_in_flight

"""Runs a way of scaling through a day, second by second."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.autoscaling.decision import INTAKE_OVERSUBSCRIPTION
from pipelines.autoscaling.simulation.cluster import ClusterSpec, SimulatedFleet
from pipelines.autoscaling.simulation.load import WARM_UP_S, ArrivalCounts
from pipelines.autoscaling.simulation.scalers import ClusterView, Scaler

_METRICS_S = 2
"""How old the numbers are that a scaler sees."""
MINUTE_S = 60


@dataclass(frozen=True)
class SimulatedDay:
    """A day of one way of scaling. The warm-up is left out."""

    waits_s: npt.NDArray[np.float64]
    """From submission to verdict, of the submissions of each second: the wait of the last one of them."""
    arrived: ArrivalCounts
    replicas: npt.NDArray[np.int64]
    target: npt.NDArray[np.int64]
    backlog: npt.NDArray[np.float64]
    gpu_hours: float
    actions: int
    lost: int

    def percentile_s(self, share: float) -> float:
        """Of all submissions."""
        return weighted_percentile(self.waits_s, self.arrived, share)

    def p99_by_minute_s(self) -> npt.NDArray[np.float64]:
        """Of the submissions that came in each minute; 0 where none came."""
        waits, arrived = self.waits_s.reshape(-1, MINUTE_S), self.arrived.reshape(-1, MINUTE_S)
        return np.array([weighted_percentile(w, a, 0.99) for w, a in zip(waits, arrived, strict=True)])


def weighted_percentile(values: npt.NDArray[np.float64], weights: ArrivalCounts, share: float) -> float:
    """The smallest value that so large a share of the weights does not exceed; 0 without any weight."""
    order = np.argsort(values)
    heap = np.cumsum(weights[order])
    if not len(heap) or heap[-1] == 0:
        return 0.0
    return float(values[order[np.searchsorted(heap, share * heap[-1])]])


def simulate_day(arrivals: ArrivalCounts, scaler: Scaler, cluster: ClusterSpec, seed: int) -> SimulatedDay:
    """Simulate. Submissions are judged in the order in which they came; all partitions are worked alike."""
    seconds = len(arrivals)
    fleet = SimulatedFleet(cluster, np.random.default_rng(seed + 1_000_003))
    settled = np.zeros(seconds + 1)
    replicas, target = np.zeros(seconds, np.int64), np.zeros(seconds, np.int64)
    published = np.concatenate([[0], np.cumsum(arrivals)]).astype(float)
    places_most = INTAKE_OVERSUBSCRIPTION * cluster.max_replicas * cluster.guard_in_flight
    held = places_most if scaler.members is None else scaler.members * cluster.intake_in_flight
    fed = held // cluster.guard_in_flight
    seen = (0, 0.0, 0.0, 0.0)
    done, billed_s, actions = 0.0, 0.0, 0
    for second in range(seconds):
        fleet.advance(second)
        if second == WARM_UP_S:
            billed_s, actions = fleet.gpu_s, fleet.changes
        places = fleet.running * cluster.guard_in_flight
        done -= min(fleet.lose(1.0) * cluster.guard_in_flight, max(0.0, published[second] - done))
        capacity = min(fleet.running, fed) * cluster.replica_rate
        served = min(published[second + 1] - done, capacity)
        done += served
        settled[second + 1] = done
        waiting = published[second + 1] - done
        busy = served / capacity * places if capacity else 0.0
        at_guard = min(busy + waiting, held)
        replicas[second], target[second] = fleet.running, fleet.target
        if (second + _METRICS_S) % scaler.every_s == 0:
            seen = (second, waiting + busy, published[second + 1], at_guard)
        if second % scaler.every_s == 0 and second >= _METRICS_S:
            fleet.set_target(
                scaler.replicas(
                    ClusterView(*seen, fleet.running, fleet.target, fleet.scaled_up_at_s, fleet.scaled_down_at_s)
                )
            )
    fleet.advance(seconds)
    settled = np.maximum.accumulate(settled)
    ends = np.searchsorted(settled[1:], published[1:] - 1e-6)
    waits = np.maximum(0, ends - np.arange(seconds)) + cluster.service_s
    day = slice(WARM_UP_S, None)
    return SimulatedDay(
        waits_s=waits[day].astype(float),
        arrived=arrivals[day],
        replicas=replicas[day],
        target=target[day],
        backlog=(published[1:] - settled[1:])[day],
        gpu_hours=(fleet.gpu_s - billed_s) / 3600,
        actions=fleet.changes - actions,
        lost=fleet.lost,
    )

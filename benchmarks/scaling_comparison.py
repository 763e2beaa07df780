"""One day of load, scaled by Sluice, by Ray Serve's default and by KEDA's lag rule, and by the oracle."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np

from benchmarks.scaling_oracle import Schedule, cheapest
from pipelines.autoscaling.decision import Rules
from pipelines.autoscaling.simulation.cluster import ClusterSpec
from pipelines.autoscaling.simulation.day import SimulatedDay, simulate_day
from pipelines.autoscaling.simulation.load import WARM_UP_S, LoadProfile, draw_arrivals
from pipelines.autoscaling.simulation.scalers import KedaScaler, RayDefaultScaler, Scaler, SluiceScaler

S = TypeVar("S", bound=Scaler)

_RAY_TARGETS: Final = (16.0, 15.0, 14.0, 12.0, 8.0)
"""Ongoing requests of one replica; it has 16 places. (Serve's default of 2 costs several times as much.)"""
_RAY_FEEDS: Final = (1.0, 0.6, 0.45, 0.38, 0.34, 0.31, 0.28, 0.25)
"""Intake members, as a share of those that feed the largest fleet."""
_KEDA_SHARES: Final = (0.5, 0.4, 0.3, *(each / 100 for each in range(26, 12, -1)), 0.1, 0.05)
"""Lag of one replica, as a share of what it judges within the objective."""


@dataclass(frozen=True)
class Day:
    """What became of a day. `ray` and `keda` come with what did best."""

    objective_s: float
    work_gpu_hours: float
    """Of replicas that judge without a pause, loading left out: nothing can be cheaper."""
    sluice: SimulatedDay
    ray: tuple[RayDefaultScaler, SimulatedDay]
    keda: tuple[KedaScaler, SimulatedDay]
    oracle: Schedule

    @property
    def counted(self) -> float:
        """Share of the minutes that count: those that the oracle does not miss."""
        return 1 - float(self.oracle.misses.mean())

    def within(self, outcome: SimulatedDay) -> float:
        """Share of the minutes that count whose p99 is within the objective."""
        counts = ~self.oracle.misses
        return float(np.mean(outcome.p99_by_minute_s()[counts] <= self.objective_s)) if counts.any() else 1.0


def compare(
    seed: int,
    objective_s: float,
    load: LoadProfile = LoadProfile(),  # noqa: B008 - immutable
    cluster: ClusterSpec = ClusterSpec(),  # noqa: B008 - immutable
) -> Day:
    """Simulate the day of a seed.

    The baselines get what no user has: of a range of settings the cheapest one that, on this very day, keeps the p99
    of all submissions within the objective (or comes nearest to it, where none does).
    """
    arrivals = draw_arrivals(load, seed)
    # Nobody is told the true rate of a replica; Sluice begins with one that is 20 % off, and measures.
    rules = Rules(objective_s=objective_s, replica_rate=0.8 * cluster.replica_rate)

    most = cluster.max_replicas * cluster.guard_in_flight / cluster.intake_in_flight
    ray = [RayDefaultScaler(cluster, each, math.ceil(feed * most)) for feed in _RAY_FEEDS for each in _RAY_TARGETS]
    keda = [KedaScaler(cluster, share * cluster.replica_rate * objective_s) for share in _KEDA_SHARES]

    def tuned(scalers: Sequence[S]) -> tuple[S, SimulatedDay]:
        tried = [(each, simulate_day(arrivals, each, cluster, seed)) for each in scalers]
        keep = [each for each in tried if each[1].percentile_s(0.99) <= objective_s]
        if keep:
            return min(keep, key=lambda each: each[1].gpu_hours)
        return min(tried, key=lambda each: each[1].percentile_s(0.99))

    return Day(
        objective_s=objective_s,
        work_gpu_hours=float(arrivals[WARM_UP_S:].sum()) / cluster.replica_rate / 3600,
        sluice=simulate_day(arrivals, SluiceScaler(rules, cluster), cluster, seed),
        ray=tuned(ray),
        keda=tuned(keda),
        oracle=cheapest(arrivals, cluster, objective_s),
    )

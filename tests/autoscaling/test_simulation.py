"""The simulated day: its load, its fleet, the other scalers, and the oracle."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.scaling_oracle import cheapest
from pipelines.autoscaling.replica_decision import Rules
from pipelines.autoscaling.simulation.cluster import ClusterSpec, SimulatedFleet
from pipelines.autoscaling.simulation.day import simulate_day, weighted_percentile
from pipelines.autoscaling.simulation.load import DAY_S, WARM_UP_S, LoadProfile, draw_arrivals
from pipelines.autoscaling.simulation.scalers import ClusterView, KedaScaler, RayDefaultScaler, SluiceScaler

DETERMINISTIC = ClusterSpec(node_s=(300, 300), cold_start_s=(100, 100), spot_losses_per_hour=0)
"""Without randomness."""


class ConstantScaler:
    """Always wants the same number of replicas."""

    interval_s = 2
    intake_members: int | None = None

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas

    def decide(self, view: ClusterView) -> int:
        return self._replicas


def view(
    now_s: float, *, backlog: float = 0, at_guard: float = 0, running: int = 0, wanted: int | None = None
) -> ClusterView:
    return ClusterView(now_s, backlog, 0.0, at_guard, running, running if wanted is None else wanted, None, None)


def fleet(cluster: ClusterSpec = DETERMINISTIC) -> SimulatedFleet:
    return SimulatedFleet(cluster, np.random.default_rng(1))


def test_arrivals_of_another_seed_differ() -> None:
    one = draw_arrivals(LoadProfile(), 1)
    assert len(one) == WARM_UP_S + DAY_S
    assert (one == draw_arrivals(LoadProfile(), 1)).all()
    assert (one != draw_arrivals(LoadProfile(), 2)).any()
    assert draw_arrivals(LoadProfile(spikes=0), 1)[WARM_UP_S:].mean() == pytest.approx(100, rel=0.05)


def test_replica_on_an_idle_node_waits_only_for_its_cold_start() -> None:
    simulated = fleet()
    simulated.set_target(1)
    simulated.advance(399)
    assert simulated.running == 0
    simulated.advance(400)
    assert simulated.running == 1
    simulated.set_target(0)
    simulated.advance(430)
    simulated.set_target(1)
    simulated.advance(530)
    assert simulated.running == 1


def test_gpu_time_counts_from_a_nodes_start_to_its_end() -> None:
    simulated = fleet()
    simulated.set_target(2)
    simulated.advance(600)
    assert simulated.gpu_s == pytest.approx(2 * 300)
    simulated.set_target(1)
    simulated.advance(1000)
    assert simulated.gpu_s == pytest.approx(2 * 300 + 400 + DETERMINISTIC.node_idle_s)


def test_requested_node_that_is_not_needed_still_starts_and_counts() -> None:
    simulated = fleet()
    simulated.set_target(1)
    simulated.advance(10)
    simulated.set_target(0)
    simulated.advance(1000)
    assert simulated.running == 0
    assert simulated.gpu_s == pytest.approx(DETERMINISTIC.node_idle_s)


def test_lost_replicas_are_replaced() -> None:
    simulated = fleet(replace(DETERMINISTIC, spot_losses_per_hour=36_000))
    simulated.set_target(3)
    simulated.advance(400)
    assert simulated.lose_nodes(60) == 3
    assert simulated.running == 0
    simulated.advance(800)
    assert simulated.running == 3


def test_day_with_a_burst_judges_everything_in_order() -> None:
    arrivals = np.full(WARM_UP_S + 1200, 10)
    day = simulate_day(arrivals, ConstantScaler(3), DETERMINISTIC, 1)
    assert set(day.waits_s) == {DETERMINISTIC.service_s}
    assert day.gpu_hours == pytest.approx(3 * 1200 / 3600)
    arrivals[WARM_UP_S] += 100  # 110 at 15 a second: the last one ends in the eighth second
    day = simulate_day(arrivals, ConstantScaler(3), DETERMINISTIC, 1)
    assert day.waits_s.max() == 7 + DETERMINISTIC.service_s
    assert day.backlog[-1] == 0


def test_weighted_percentile_counts_each_weight() -> None:
    assert weighted_percentile(np.array([5.0, 1.0]), np.array([1, 99]), 0.99) == 1
    assert weighted_percentile(np.array([5.0, 1.0]), np.array([2, 98]), 0.99) == 5
    assert weighted_percentile(np.array([5.0]), np.array([0]), 0.99) == 0


def test_ray_default_scaler_waits_for_its_delays() -> None:
    ray = RayDefaultScaler(DETERMINISTIC, target_ongoing_requests=2)
    assert ray.decide(view(0, at_guard=1)) == 1
    decided = [ray.decide(view(second, at_guard=20, running=4)) for second in range(40, 74, 2)]
    assert decided[:15] == [4] * 15  # upscale_delay_s
    assert decided[15] == 10
    calm = [ray.decide(view(second, running=4)) for second in range(200, 860, 2)]
    assert calm.index(1) == 300  # downscale_delay_s; to zero only from one


def test_keda_scaler_limits_its_steps() -> None:
    keda = KedaScaler(DETERMINISTIC, lag_threshold=100)
    assert keda.decide(view(0, backlog=1)) == 1
    assert keda.decide(view(15, backlog=5000, running=1)) == 5  # at most four more, or twice as many
    assert keda.decide(view(30, backlog=1050, running=10)) == 10  # within the tolerance
    assert keda.decide(view(45, backlog=200, running=10)) == 10  # more was wanted within 300 s
    assert keda.decide(view(400, backlog=200, running=10)) == 2
    assert keda.decide(view(701, running=2)) == 0  # cooldownPeriod


def test_oracle_pays_only_for_work_and_loading() -> None:
    arrivals = np.full(WARM_UP_S + 7200, 10)
    schedule = cheapest(arrivals, DETERMINISTIC, 300)
    assert schedule.gpu_hours == pytest.approx(2 * 2, rel=0.05)  # two replicas for two hours, less what may be late
    assert not schedule.misses.any()
    spike = arrivals.copy()
    spike[WARM_UP_S + 3600 : WARM_UP_S + 4200] = 100
    dearer = cheapest(spike, DETERMINISTIC, 300)
    work_hours = 600 * 90 / DETERMINISTIC.replica_rate / 3600
    assert work_hours < dearer.gpu_hours - schedule.gpu_hours < 1.3 * work_hours


def test_oracle_with_too_few_replicas_misses_the_spike() -> None:
    arrivals = np.full(WARM_UP_S + 7200, 10)
    arrivals[WARM_UP_S + 3600 : WARM_UP_S + 4200] = 100
    schedule = cheapest(arrivals, replace(DETERMINISTIC, max_replicas=3), 300)
    missed = np.flatnonzero(schedule.misses)
    assert 60 <= missed[0] < 64
    assert schedule.replicas.max() <= 3 + 1e-6


def test_sluice_scaler_on_a_spike_keeps_the_objective_and_costs_less_than_keda() -> None:
    arrivals = np.random.default_rng(5).poisson(50, WARM_UP_S + 14_400)
    arrivals[WARM_UP_S + 5000 : WARM_UP_S + 6000] *= 5
    cluster = ClusterSpec(max_replicas=200)
    sluice = simulate_day(arrivals, SluiceScaler(Rules(objective_s=300, replica_rate=4), cluster), cluster, 1)
    keda = simulate_day(arrivals, KedaScaler(cluster, 0.17 * 300 * cluster.replica_rate), cluster, 1)
    assert sluice.p99_by_minute_s().max() <= 300
    assert sluice.gpu_hours < keda.gpu_hours
    assert sluice.gpu_hours < 1.25 * cheapest(arrivals, cluster, 300).gpu_hours

"""The simulated day: its load, its fleet, the baselines' rules, and the oracle."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.scaling_oracle import cheapest
from pipelines.autoscaling.decision import Rules
from pipelines.autoscaling.simulation.cluster import ClusterSpec, SimulatedFleet
from pipelines.autoscaling.simulation.day import simulate_day, weighted_percentile
from pipelines.autoscaling.simulation.load import DAY_S, WARM_UP_S, LoadProfile, draw_arrivals
from pipelines.autoscaling.simulation.scalers import ClusterView, KedaScaler, RayDefaultScaler, SluiceScaler

SURE = ClusterSpec(node_s=(300, 300), cold_start_s=(100, 100), spot_losses_per_hour=0)
"""Without randomness."""


class Always:
    """So many replicas, whatever happens."""

    every_s = 2
    members: int | None = None

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas

    def replicas(self, view: ClusterView) -> int:
        return self._replicas


def view(
    now_s: float, *, backlog: float = 0, at_guard: float = 0, running: int = 0, wanted: int | None = None
) -> ClusterView:
    return ClusterView(now_s, backlog, 0.0, at_guard, running, running if wanted is None else wanted, None, None)


def fleet(cluster: ClusterSpec = SURE) -> SimulatedFleet:
    return SimulatedFleet(cluster, np.random.default_rng(1))


def test_a_day_is_the_same_for_the_same_seed_only() -> None:
    one = draw_arrivals(LoadProfile(), 1)
    assert len(one) == WARM_UP_S + DAY_S
    assert (one == draw_arrivals(LoadProfile(), 1)).all()
    assert (one != draw_arrivals(LoadProfile(), 2)).any()
    assert draw_arrivals(LoadProfile(spikes=0), 1)[WARM_UP_S:].mean() == pytest.approx(100, rel=0.05)


def test_a_replica_takes_its_node_and_its_cold_start_and_a_warm_node_only_the_latter() -> None:
    of_one = fleet()
    of_one.set_target(1)
    of_one.advance(399)
    assert of_one.running == 0
    of_one.advance(400)
    assert of_one.running == 1
    of_one.set_target(0)
    of_one.advance(430)
    of_one.set_target(1)
    of_one.advance(530)
    assert of_one.running == 1


def test_gpus_are_paid_from_the_node_to_its_end() -> None:
    of_one = fleet()
    of_one.set_target(2)
    of_one.advance(600)
    assert of_one.gpu_s == pytest.approx(2 * 300)
    of_one.set_target(1)
    of_one.advance(1000)
    assert of_one.gpu_s == pytest.approx(2 * 300 + 400 + SURE.node_idle_s)


def test_a_node_that_is_not_wanted_any_more_comes_and_is_paid_all_the_same() -> None:
    of_one = fleet()
    of_one.set_target(1)
    of_one.advance(10)
    of_one.set_target(0)
    of_one.advance(1000)
    assert of_one.running == 0
    assert of_one.gpu_s == pytest.approx(SURE.node_idle_s)


def test_what_is_lost_is_replaced() -> None:
    of_one = fleet(replace(SURE, spot_losses_per_hour=36_000))
    of_one.set_target(3)
    of_one.advance(400)
    assert of_one.lose(60) == 3
    assert of_one.running == 0
    of_one.advance(800)
    assert of_one.running == 3


def test_everything_is_judged_and_waits_as_long_as_it_must() -> None:
    arrivals = np.full(WARM_UP_S + 1200, 10)
    day = simulate_day(arrivals, Always(3), SURE, 1)
    assert set(day.waits_s) == {SURE.service_s}
    assert day.gpu_hours == pytest.approx(3 * 1200 / 3600)
    arrivals[WARM_UP_S] += 100  # 110 at 15 a second: the last one ends in the eighth second
    day = simulate_day(arrivals, Always(3), SURE, 1)
    assert day.waits_s.max() == 7 + SURE.service_s
    assert day.backlog[-1] == 0


def test_weighted_percentiles() -> None:
    assert weighted_percentile(np.array([5.0, 1.0]), np.array([1, 99]), 0.99) == 1
    assert weighted_percentile(np.array([5.0, 1.0]), np.array([2, 98]), 0.99) == 5
    assert weighted_percentile(np.array([5.0]), np.array([0]), 0.99) == 0


def test_ray_serves_default_waits_for_its_delays() -> None:
    ray = RayDefaultScaler(SURE, target_ongoing_requests=2)
    assert ray.replicas(view(0, at_guard=1)) == 1
    decided = [ray.replicas(view(second, at_guard=20, running=4)) for second in range(40, 74, 2)]
    assert decided[:15] == [4] * 15  # upscale_delay_s
    assert decided[15] == 10
    calm = [ray.replicas(view(second, running=4)) for second in range(200, 860, 2)]
    assert calm.index(1) == 300  # downscale_delay_s; to zero only from one


def test_kedas_rule() -> None:
    keda = KedaScaler(SURE, lag_threshold=100)
    assert keda.replicas(view(0, backlog=1)) == 1
    assert keda.replicas(view(15, backlog=5000, running=1)) == 5  # at most four more, or twice as many
    assert keda.replicas(view(30, backlog=1050, running=10)) == 10  # within the tolerance
    assert keda.replicas(view(45, backlog=200, running=10)) == 10  # more was wanted within 300 s
    assert keda.replicas(view(400, backlog=200, running=10)) == 2
    assert keda.replicas(view(701, running=2)) == 0  # cooldownPeriod


def test_the_oracle_pays_for_work_and_loading_only() -> None:
    arrivals = np.full(WARM_UP_S + 7200, 10)
    schedule = cheapest(arrivals, SURE, 300)
    assert schedule.gpu_hours == pytest.approx(2 * 2, rel=0.05)  # two replicas for two hours, less what may be late
    assert not schedule.misses.any()
    spike = arrivals.copy()
    spike[WARM_UP_S + 3600 : WARM_UP_S + 4200] = 100
    dearer = cheapest(spike, SURE, 300)
    work_hours = 600 * 90 / SURE.replica_rate / 3600
    assert work_hours < dearer.gpu_hours - schedule.gpu_hours < 1.3 * work_hours


def test_the_oracle_misses_what_the_bounds_do_not_allow() -> None:
    arrivals = np.full(WARM_UP_S + 7200, 10)
    arrivals[WARM_UP_S + 3600 : WARM_UP_S + 4200] = 100
    schedule = cheapest(arrivals, replace(SURE, max_replicas=3), 300)
    missed = np.flatnonzero(schedule.misses)
    assert 60 <= missed[0] < 64
    assert schedule.replicas.max() <= 3 + 1e-6


def test_sluice_is_cheaper_than_the_baselines_on_an_afternoon_with_a_spike() -> None:
    arrivals = np.random.default_rng(5).poisson(50, WARM_UP_S + 14_400)
    arrivals[WARM_UP_S + 5000 : WARM_UP_S + 6000] *= 5
    cluster = ClusterSpec(max_replicas=200)
    sluice = simulate_day(arrivals, SluiceScaler(Rules(objective_s=300, replica_rate=4), cluster), cluster, 1)
    keda = simulate_day(arrivals, KedaScaler(cluster, 0.17 * 300 * cluster.replica_rate), cluster, 1)
    assert sluice.p99_by_minute_s().max() <= 300
    assert sluice.gpu_hours < keda.gpu_hours
    assert sluice.gpu_hours < 1.25 * cheapest(arrivals, cluster, 300).gpu_hours

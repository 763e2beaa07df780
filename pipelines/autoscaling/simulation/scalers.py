"""Three ways to scale the guard: Sluice's, Ray Serve's default and KEDA's lag rule."""

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from pipelines.autoscaling.measurements import Measurements, Reading
from pipelines.autoscaling.replica_decision import Backlog, ReplicaBounds, ReplicaCounts, Rules, decide_replicas
from pipelines.autoscaling.simulation.cluster import ClusterSpec


@dataclass(frozen=True, slots=True)
class ClusterView:
    """The numbers that a scaler can read at one moment. Time is in seconds."""

    now_s: float
    backlog: float
    """Messages that are published and not settled."""
    published: float
    at_guard: float
    """Submissions that intake has sent to the guard."""
    running: int
    target: int
    scaled_up_at_s: float | None
    """Time of the last request for more replicas."""
    scaled_down_at_s: float | None


class Scaler(Protocol):
    """Decides how many replicas there should be."""

    interval_s: int
    intake_members: int | None
    """The number of intake members, if it is fixed; None if there are always enough."""

    def decide(self, view: ClusterView) -> int: ...


def _since(now_s: float, at_s: float | None) -> float | None:
    return None if at_s is None else now_s - at_s


class SluiceScaler:
    """The decision and the measurements of production, on the numbers that Intake would have recorded."""

    interval_s: int = 2
    intake_members: int | None = None

    def __init__(self, rules: Rules, cluster: ClusterSpec) -> None:
        self._rules, self._bounds = rules, ReplicaBounds(0, cluster.max_replicas)
        self._measured = Measurements(rules)
        self._intake = ReplicaCounts(1, 1, ReplicaBounds(1, cluster.max_replicas))

    def decide(self, view: ClusterView) -> int:
        guard = ReplicaCounts(
            view.running,
            view.target,
            self._bounds,
            _since(view.now_s, view.scaled_up_at_s),
            _since(view.now_s, view.scaled_down_at_s),
        )
        live = Backlog(view.backlog)
        self._measured.record_replicas(view.now_s, guard)
        self._measured.record_reading(Reading(view.now_s, live, view.published, at_guard=view.at_guard), guard)
        decision = decide_replicas(self._measured.observe(view.now_s, guard, self._intake, live), self._rules)
        self._intake = ReplicaCounts(decision.intake, decision.intake, self._intake.bounds)
        return decision.guard


@dataclass
class RayDefaultScaler:
    """Ray Serve 2.60's own policy (`ray/serve/autoscaling_policy.py`) with its defaults, on ongoing requests.

    Ongoing requests are averaged over `look_back_period_s`. The policy wants so many replicas that each has
    `target_ongoing_requests`. A change is made once it has been wanted for a delay. From zero, one replica is started;
    zero is reached from one. A fixed number of intake members limits the ongoing requests.
    """

    cluster: ClusterSpec
    target_ongoing_requests: float
    intake_members: int | None = None
    look_back_period_s: float = 30.0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    interval_s: int = 2
    _ongoing: deque[tuple[float, float]] = field(default_factory=deque)
    _direction: int = 0
    _since_s: float = 0.0

    def decide(self, view: ClusterView) -> int:
        self._ongoing.append((view.now_s, view.at_guard))
        while self._ongoing[0][0] < view.now_s - self.look_back_period_s:
            self._ongoing.popleft()
        ongoing = sum(each for _, each in self._ongoing) / len(self._ongoing)
        if view.running == 0:
            return max(1, view.target) if ongoing > 0 else view.target
        desired = min(math.ceil(round(ongoing / self.target_ongoing_requests, 9)), self.cluster.max_replicas)
        direction = (desired > view.target) - (desired < view.target)
        if direction != self._direction:
            self._direction, self._since_s = direction, view.now_s
        delay_s = self.upscale_delay_s if direction > 0 else self.downscale_delay_s
        if not direction or view.now_s - self._since_s < delay_s:
            return view.target
        self._direction = 0
        return desired if direction > 0 or view.target == 1 else max(1, desired)


@dataclass
class KedaScaler:
    """KEDA's Kafka scaler: lag / `lag_threshold` replicas, through a HorizontalPodAutoscaler.

    The defaults hold. The autoscaler reads the lag every 15 s and ignores a difference within 10 %. In 15 s it adds at
    most four replicas, or doubles them. It removes no replica that was wanted within 300 s. KEDA itself reads the lag
    every 30 s to start the first replica, and removes the last one 300 s (`cooldownPeriod`) after the last lag. The
    guard is no consumer, so the number of partitions does not limit it (`allowIdleConsumers: true`).
    """

    cluster: ClusterSpec
    lag_threshold: float
    intake_members: int | None = None
    interval_s: int = 15
    stabilization_s: float = 300.0
    cooldown_s: float = 300.0
    _desired: deque[tuple[float, int]] = field(default_factory=deque)
    _active_s: float = 0.0

    def decide(self, view: ClusterView) -> int:
        if view.backlog > 0:
            self._active_s = view.now_s
        if view.target == 0:
            return 1 if view.backlog > 0 and view.now_s % 30 < self.interval_s else 0
        if view.now_s - self._active_s >= self.cooldown_s:
            return 0
        desired = max(1, min(math.ceil(view.backlog / self.lag_threshold), self.cluster.max_replicas))
        if abs(view.backlog / self.lag_threshold / view.target - 1) <= 0.1:
            desired = view.target
        self._desired.append((view.now_s, desired))
        while self._desired[0][0] <= view.now_s - self.stabilization_s:
            self._desired.popleft()
        if desired > view.target:
            return min(desired, max(2 * view.target, view.target + 4))
        return min(view.target, max(each for _, each in self._desired))

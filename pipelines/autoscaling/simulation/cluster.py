"""GPU replicas that take their time to come, and may be lost."""

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """What a replica and its node are like: one GPU each. Durations in seconds."""

    replica_rate: float = 5.0
    """Submissions a second that one replica judges."""
    service_s: float = 2.0
    """From a free place at the guard to the published verdict."""
    node_s: tuple[float, float] = (120.0, 480.0)
    """From the wish for a node until it is there."""
    cold_start_s: tuple[float, float] = (30.0, 180.0)
    """From the node to a replica that judges."""
    node_idle_s: float = 60.0
    """How long a node without a replica is kept."""
    spot_losses_per_hour: float = 0.02
    """Of one node. It is gone at once, and what its replica had is judged again."""
    guard_in_flight: int = 16
    intake_in_flight: int = 64
    max_replicas: int = 500


@dataclass
class SimulatedFleet:
    """The guard's replicas over a day. Time in seconds; it only goes on."""

    cluster: ClusterSpec
    rng: np.random.Generator
    running: int = 0
    target: int = 0
    gpu_s: float = 0.0
    """Seconds of GPUs that were there: with a replica that judges or loads, or without one."""
    changes: int = 0
    lost: int = 0
    scaled_up_at_s: float | None = None
    scaled_down_at_s: float | None = None
    _now_s: float = 0.0
    _events: list[tuple[float, int]] = field(default_factory=list)
    _provisioning: dict[int, None] = field(default_factory=dict)
    """Events that still count, the newest last; likewise the next two."""
    _loading: dict[int, None] = field(default_factory=dict)
    _idle: dict[int, None] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def set_target(self, replicas: int) -> None:
        """Ask for so many replicas, or let some go: first those without a node, then those that load.

        A node that was asked for comes all the same; without a replica it is idle, and soon goes.
        """
        if replicas == self.target:
            return
        self.changes += 1
        if replicas > self.target:
            self.scaled_up_at_s = self._now_s
        else:
            self.scaled_down_at_s = self._now_s
        self.target = replicas
        self._reconcile()

    def advance(self, now_s: float) -> None:
        """Let time pass."""
        while self._events and self._events[0][0] <= now_s:
            at_s, number = heapq.heappop(self._events)
            self._bill(at_s)
            if number in self._provisioning:
                del self._provisioning[number]
                self._release()
                self._reconcile()
            elif number in self._loading:
                del self._loading[number]
                self.running += 1
            else:
                self._idle.pop(number, None)
        self._bill(now_s)

    def lose(self, duration_s: float) -> int:
        """Lose spot nodes at random, at the rate of `duration_s`. Return how many."""
        rate = self.running * self.cluster.spot_losses_per_hour * duration_s / 3600
        lost = min(self.running, int(self.rng.poisson(rate))) if rate else 0
        if lost:
            self.running -= lost
            self.lost += lost
            self._reconcile()
        return lost

    def _reconcile(self) -> None:
        for _ in range(self.running + len(self._loading) - self.target):
            if self._loading:
                self._loading.popitem()
            else:
                self.running -= 1
            self._release()
        for _ in range(min(len(self._idle), self.target - self.running - len(self._loading))):
            self._idle.popitem()
            self._push(self._loading, self.cluster.cold_start_s)
        for _ in range(self.target - self.running - len(self._loading) - len(self._provisioning)):
            self._push(self._provisioning, self.cluster.node_s)

    def _release(self) -> None:
        self._push(self._idle, (self.cluster.node_idle_s, self.cluster.node_idle_s))

    def _push(self, pending: dict[int, None], after_s: tuple[float, float]) -> None:
        number = next(self._numbers)
        pending[number] = None
        heapq.heappush(self._events, (self._now_s + self.rng.uniform(*after_s), number))

    def _bill(self, now_s: float) -> None:
        self.gpu_s += (self.running + len(self._loading) + len(self._idle)) * (now_s - self._now_s)
        self._now_s = now_s

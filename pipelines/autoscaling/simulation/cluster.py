"""A simulated fleet of GPU replicas: they start slowly, and spot nodes are lost."""

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """The properties of replicas and nodes. Each node has one GPU and one replica. Durations are in seconds."""

    replica_rate: float = 5.0
    """Submissions a second of one replica."""
    service_s: float = 2.0
    """Time from a free slot at the guard to the published verdict."""
    node_s: tuple[float, float] = (120.0, 480.0)
    """Time from the request for a node until it is ready, at least and at most."""
    cold_start_s: tuple[float, float] = (30.0, 180.0)
    """Time from a ready node until its replica judges, at least and at most."""
    node_idle_s: float = 60.0
    """Time for which a node without a replica is kept."""
    spot_losses_per_hour: float = 0.02
    """Losses of one node. A lost node is gone at once, and the submissions of its replica are judged again."""
    guard_in_flight: int = 16
    intake_in_flight: int = 64
    max_replicas: int = 500


@dataclass
class SimulatedFleet:
    """The guard's replicas over a day. Time is in seconds and never goes back."""

    cluster: ClusterSpec
    rng: np.random.Generator
    running: int = 0
    target: int = 0
    gpu_s: float = 0.0
    """GPU-seconds of all nodes, with or without a replica."""
    changes: int = 0
    lost: int = 0
    scaled_up_at_s: float | None = None
    scaled_down_at_s: float | None = None
    _now_s: float = 0.0
    _events: list[tuple[float, int]] = field(default_factory=list)
    _provisioning: dict[int, None] = field(default_factory=dict)
    """Event numbers of the nodes that are being provisioned, the newest last. `_loading` and `_idle` likewise."""
    _loading: dict[int, None] = field(default_factory=dict)
    _idle: dict[int, None] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def set_target(self, replicas: int) -> None:
        """Request replicas or remove some: first those without a node, then loading ones, then running ones.

        A requested node starts in any case. Without a replica it is idle, and is removed soon.
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
        """Let the time pass until `now_s`."""
        while self._events and self._events[0][0] <= now_s:
            at_s, number = heapq.heappop(self._events)
            self._bill(at_s)
            if number in self._provisioning:
                del self._provisioning[number]
                self._keep_idle_node()
                self._reconcile()
            elif number in self._loading:
                del self._loading[number]
                self.running += 1
            else:
                self._idle.pop(number, None)
        self._bill(now_s)

    def lose_nodes(self, duration_s: float) -> int:
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
            self._keep_idle_node()
        for _ in range(min(len(self._idle), self.target - self.running - len(self._loading))):
            self._idle.popitem()
            self._schedule(self._loading, self.cluster.cold_start_s)
        for _ in range(self.target - self.running - len(self._loading) - len(self._provisioning)):
            self._schedule(self._provisioning, self.cluster.node_s)

    def _keep_idle_node(self) -> None:
        self._schedule(self._idle, (self.cluster.node_idle_s, self.cluster.node_idle_s))

    def _schedule(self, pending: dict[int, None], after_s: tuple[float, float]) -> None:
        number = next(self._numbers)
        pending[number] = None
        heapq.heappush(self._events, (self._now_s + self.rng.uniform(*after_s), number))

    def _bill(self, now_s: float) -> None:
        self.gpu_s += (self.running + len(self._loading) + len(self._idle)) * (now_s - self._now_s)
        self._now_s = now_s

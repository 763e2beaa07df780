"""A Ray cluster whose nodes are processes of this machine, for tests that lose them.

The head does no work and keeps its state in Redis, as KubeRay's does; GPUs are only said to be there. A node is one
`ray start --block` with all that it starts, and ends with it.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Literal

import psutil
import ray

from services.core.processes import SupervisedProcess, find_free_port
from tests.support.kafka_broker import ROOT

Kind = Literal["cpu", "gpu"]

_RESOURCES: Final[Mapping[Kind, tuple[str, str]]] = {
    "cpu": ("--num-cpus=1", "--num-gpus=0"),
    "gpu": ("--num-cpus=2", "--num-gpus=2", "--labels=sluice.io/role=guard"),
}
"""A place for one intake, and places for two guards: one of them is free for what an upgrade starts before it ends."""
_TRIES: Final = 5
_AT_ONCE: Final = 2
_START_S: Final = 120.0
_POLL_S: Final = 0.2
_STARTED: Final = "Ray runtime started"
_SHARED: Final = {
    "RAY_AUTH_MODE": "disabled",  # a cluster of one test, on this machine
    "RAY_USAGE_STATS_ENABLED": "0",
    # As KubeRay sets it for workers: the default, a minute, is what a head may take to come back.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
    # A node that refuses connections is lost after five of these; one that is only slow has far longer.
    "RAY_health_check_period_ms": "1000",
}


class Node:
    """One machine, as far as Ray is concerned."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        self._argv = argv
        self._environment = environment
        self._folder = folder
        self._starts = 0
        self._child: SupervisedProcess | None = None

    def start(self) -> None:
        """Start it, with nothing on its disk, and wait until it belongs to the cluster. Blocks.

        Ray gives a node 30 s, which is not always enough where the machine is busy: then again.
        """
        for _ in range(_TRIES):
            self._starts += 1
            disk = self._folder.with_name(f"{self._folder.name}-{self._starts}")
            log = disk / "log"
            self._child = SupervisedProcess([*self._argv, f"--temp-dir={disk}"], log=log, env=self._environment)
            deadline = time.monotonic() + _START_S
            while self._child.returncode is None and time.monotonic() < deadline:
                if _STARTED in log.read_text(errors="replace"):
                    return
                time.sleep(_POLL_S)
            self._child.kill()
        raise RuntimeError(f"a node of Ray did not start:\n{log.read_text(errors='replace')}")

    def kill(self) -> None:
        """SIGKILL all of it, as a machine dies that is switched off."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def freeze(self) -> None:
        """Stop all of it where it is, as a machine that hangs: no connection is closed, and nothing is answered."""
        for process in self.processes():
            process.suspend()

    def thaw(self) -> None:
        """Let it go on, with no idea that time has passed."""
        for process in self.processes():
            process.resume()

    def processes(self) -> list[psutil.Process]:
        """All that runs there."""
        return [] if self._child is None else psutil.Process(self._child.pid).children(recursive=True)

    def has(self, pid: int) -> bool:
        """Whether a process runs there."""
        return any(each.pid == pid for each in self.processes())


class Cluster:
    """The nodes. Its methods block."""

    def __init__(self, folder: Path, redis_address: str, environment: Mapping[str, str]) -> None:
        """`redis_address`: host:port, where the head keeps its state; `environment`: of whatever runs on the nodes."""
        host = ray.util.get_node_ip_address()  # Ray takes the loopback address for this one wherever it is given
        self.address = f"{host}:{find_free_port()}"
        self.environment = (
            os.environ
            | _SHARED
            | {"PYTHONPATH": str(ROOT), "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))}
            | environment
        )
        self._folder = folder
        self._options = ("--block", f"--node-ip-address={host}", f"--object-store-memory={80 << 20}")
        self._options += ("--include-log-monitor=false", "--disable-usage-stats")
        own = ("--head", f"--port={self.address.rpartition(':')[2]}", "--num-cpus=0", "--include-dashboard=false")
        own += (f"--ray-client-server-port={find_free_port()}", "--no-monitor")
        kept = {"RAY_REDIS_ADDRESS": redis_address, "RAY_external_storage_namespace": "test"}
        self.head = Node(["ray", "start", *own, *self._options], self.environment | kept, folder / "head")
        self.nodes: list[Node] = []
        """Without the head."""

    def add(self, *kinds: Kind) -> None:
        """Start more nodes."""
        started = [
            Node(
                ["ray", "start", f"--address={self.address}", *_RESOURCES[kind], *self._options],
                self.environment,
                self._folder / f"{kind}{number}",
            )
            for number, kind in enumerate(kinds, len(self.nodes))
        ]
        self.nodes += started
        # Each needs seconds of a core for that, and has to be done in time.
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(Node.start, started))

    def node_of(self, pid: int) -> Node:
        """Where a process runs."""
        return next(node for node in self.nodes if node.has(pid))

    def kill(self) -> None:
        """End all of it."""
        for node in (*self.nodes, self.head):
            node.kill()

"""Ten times the load, on a cluster whose nodes are processes of this machine: the events and their times.

    python benchmarks/scaling.py --cluster [--json] [--chart docs/scaling-cluster.svg]

Ray's own autoscaler starts and stops the nodes, which claim to have GPUs. A real Kafka holds the backlog. Intake and
the scaling policy are those of the product. The guard is scripted and takes as long as a real one. The run begins
without a guard replica. During the run, a GPU node and the Intake node are killed (SIGKILL). At the end no submissions
arrive, and the guard replicas go. Needs the packages of the tests marked kafka.
"""

import asyncio
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import psutil
import ray
from matplotlib import pyplot
from ray import serve
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider
from ray.serve import Application

from pipelines.serving import build as serve_build
from pipelines.serving.app import bind_application
from pipelines.serving.log_config import LOGGING_CONFIG
from pipelines.serving.names import APPLICATION, INTAKE
from services.core.messages import Submission, Verdict
from services.core.processes import SupervisedProcess, find_free_port
from services.core.settings import Settings
from services.core.values import Assessment, Detail, GuardPriority, Policy, PreparedImage
from services.streams.config import StreamConfig
from services.streams.factory import open_reader
from tests.faults.backends import Backends
from tests.faults.guard import assessment_of
from tests.faults.s3 import BUCKET
from tests.faults.streams import Backlog, Producer
from tests.support.kafka_broker import ROOT

BASE_PER_S, SPIKE_PER_S = 2.0, 20.0
BASE_S, SPIKE_S, AFTER_S = 90.0, 90.0, 60.0
LOST_S: Final = {"gpu": BASE_S + 0.75 * SPIKE_S, "cpu": BASE_S + SPIKE_S + 15}
"""When the node of each kind is killed."""
REPLICA_PER_S: Final = 4.0
"""Images a second of one replica: two at a time, half a second each."""
GUARD_IN_FLIGHT: Final = 2
START_S: Final = 10.0
"""Time that a guard replica takes to load its checkpoint, besides the start of its process."""
GPU_NODES, GPUS = 4, 2
OBJECTIVE_S: Final = 60.0
IDLE_S: Final = 30.0
_UP_S: Final = 180.0
_END_S: Final = 300.0
_TICK_S: Final = 0.5
_POLL_S: Final = 0.25


@serve.deployment(name="Guard", health_check_period_s=10, health_check_timeout_s=60)
class TimedGuard:
    """Answers as the scripted guard of the fault suite does, after the time that a real guard takes."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        self._slots = asyncio.Semaphore(settings.guard_in_flight)
        await asyncio.sleep(START_S)

    async def assess_each(
        self, image: PreparedImage, policies: Sequence[Policy], detail: Detail, priority: GuardPriority = "live"
    ) -> list[Assessment]:
        async with self._slots:
            await asyncio.sleep(GUARD_IN_FLIGHT / REPLICA_PER_S * len(policies))
        return [assessment_of(image.sha256)] * len(policies)


def build(arguments: serve_build.ApplicationArguments) -> Application:
    """The product's application, with the timed guard."""
    return bind_application(arguments, guard_gpus=1, guard=TimedGuard)


@dataclass(frozen=True, slots=True)
class ClusterSample:
    """Counts at one point in time."""

    at_s: float
    backlog: int
    target: int
    running: int
    nodes: int
    """Nodes with GPUs."""
    intake: int


@dataclass
class Timeline:
    """Observations of one run, in seconds since its begin."""

    samples: list[ClusterSample] = field(default_factory=list)
    submitted: dict[str, float] = field(default_factory=dict)
    settled: dict[str, float] = field(default_factory=dict)
    times: Counter[str] = field(default_factory=Counter)
    """How often each submission was settled."""

    def figures(self) -> dict[str, float | int]:
        """The figures of the JSON output. A delay is infinite if its event never happened."""
        spike_s = BASE_S
        before = max((each.target for each in self.samples if each.at_s <= spike_s), default=0)
        seen_s = self._first(lambda each: each.at_s > spike_s and each.backlog > 2 * SPIKE_PER_S)
        decided_s = self._first(lambda each: each.at_s > spike_s and each.target > before)
        more_nodes_s = self._first(
            lambda each: each.at_s > spike_s and each.nodes > max(s.nodes for s in self.samples if s.at_s <= spike_s)
        )
        delays = sorted(self.settled[each] - at_s for each, at_s in self.submitted.items() if each in self.settled)
        return {
            "submissions": len(self.submitted),
            "settled_once": sum(count == 1 for count in self.times.values()),
            "lost": len(self.submitted) - len(self.settled),
            "decision_s": round(max(0.0, decided_s - seen_s), 1),
            "more_nodes_s": round(more_nodes_s - spike_s, 1),
            "replicas_before": before,
            "replicas_at_most": max(each.target for each in self.samples),
            "nodes_at_most": max(each.nodes for each in self.samples),
            "replicas_at_the_end": self.samples[-1].running,
            "nodes_at_the_end": self.samples[-1].nodes,
            "p50_s": round(delays[len(delays) // 2], 1),
            "p95_s": round(delays[int(len(delays) * 0.95)], 1),
            "max_s": round(delays[-1], 1),
        }

    def _first(self, when: Any) -> float:
        return next((each.at_s for each in self.samples if when(each)), float("inf"))

    def draw(self, file: Path) -> None:
        """Draw the chart of load, backlog, replicas, nodes and delays."""
        mpl.rcParams["svg.hashsalt"] = "sluice"
        figure, (above, middle, below) = pyplot.subplots(3, 1, sharex=True, figsize=(9, 8), layout="constrained")
        at = [each.at_s for each in self.samples]
        above.plot(at, [each.backlog for each in self.samples], color="tab:red")
        above.set_ylabel("messages waiting")
        middle.step(
            at, [each.target for each in self.samples], where="post", label="guard replicas requested", color="0.6"
        )
        middle.step(at, [each.running for each in self.samples], where="post", label="guard replicas ready")
        middle.step(at, [each.nodes for each in self.samples], where="post", label="GPU nodes")
        middle.step(at, [each.intake for each in self.samples], where="post", label="intake replicas", linestyle=":")
        middle.legend(loc="upper right")
        middle.set_ylabel("replicas, nodes")
        settled = [(self.settled[each], self.settled[each] - at_s) for each, at_s in self.submitted.items()]
        below.scatter(*zip(*settled, strict=True), s=3, color="tab:green")
        below.axhline(OBJECTIVE_S, color="0.6", linestyle="--", label="objective")
        below.legend(loc="upper right")
        below.set_ylabel("s from submission to verdict")
        below.set_xlabel(
            f"s; {BASE_PER_S:g} submissions/s, {SPIKE_PER_S:g}/s from {BASE_S:g} to {BASE_S + SPIKE_S:g} s"
        )
        for axes in (above, middle, below):
            axes.axvspan(BASE_S, BASE_S + SPIKE_S, color="0.95")
            axes.set_ylim(bottom=0)
        figure.savefig(file, metadata={"Date": None})


@asynccontextmanager
async def cluster(folder: Path, environment: dict[str, str]) -> AsyncIterator[str]:
    """Run a head without work, a node for Intake, and GPU nodes on demand. Yields the address of the head."""
    port = find_free_port()
    host = ray.util.get_node_ip_address()  # Ray replaces the loopback address by this one
    address = f"{host}:{port}"
    kinds: dict[str, Any] = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "cpu": {"resources": {"CPU": 4}, "node_config": {}, "min_workers": 1, "max_workers": 1},
        "gpu": {
            "resources": {"CPU": GPUS, "GPU": GPUS},
            "labels": {"sluice.io/role": "guard"},
            "node_config": {},
            "min_workers": 0,
            "max_workers": GPU_NODES,
        },
    }
    config = {
        "cluster_name": "sluice-benchmark",
        "max_workers": GPU_NODES + 1,
        "provider": {
            "type": "external",  # "fake_multinode" needs a file that Ray's wheel lacks
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
            "gcs_address": address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "use_internal_ips": True,
            "disable_node_updaters": True,
        },
        "available_node_types": kinds,
        "head_node_type": "ray.head.default",
        "idle_timeout_minutes": 0.25,
        "upscaling_speed": 100,
        "docker": {},
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }
    file = folder / "cluster.json"
    file.write_text(json.dumps(config))
    argv = ["ray", "start", "--head", "--block", "--num-cpus=0", f"--port={port}", f"--node-ip-address={host}"]
    argv += ["--include-dashboard=false", f"--ray-client-server-port={find_free_port()}", "--disable-usage-stats"]
    argv += [f"--autoscaling-config={file}", f"--object-store-memory={80 << 20}", f"--temp-dir={folder / 'ray'}"]
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    head = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "PYTHONPATH": str(ROOT),
        "PATH": path,
    }
    child = SupervisedProcess(argv, log=folder / "head.log", env=os.environ | environment | head)
    try:
        await _wait_until_listening(host, port, child)
        ray.init(address, logging_level="ERROR", log_to_driver=False)
        yield address
        ray.shutdown()
    finally:
        child.kill()


async def _wait_until_listening(host: str, port: int, child: SupervisedProcess) -> None:
    deadline = time.monotonic() + _UP_S
    while True:
        with suppress(OSError):
            _, writer = await asyncio.open_connection(host, port)
            writer.close()
            return
        if child.returncode is not None or time.monotonic() > deadline:
            raise RuntimeError(f"Ray did not start:\n{child.tail()}")
        await asyncio.sleep(_POLL_S)


async def run(progress: Any) -> Timeline:
    """Run everything once; every started process has stopped afterwards."""
    async with AsyncExitStack() as closing:
        # The paths of Ray's sockets are long, so the folder has a short name.
        folder = Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="sl-", ignore_cleanup_errors=True)))
        backends = await Backends.start(folder / "backends", 1, "exactly_once", closing)
        settings = backends.settings.model_copy(
            update={
                "gateway_replicas": 0,
                "guard_max_replicas": GPU_NODES * GPUS,
                "intake_max_replicas": 2,
                "guard_in_flight": GUARD_IN_FLIGHT,
                "objective_s": OBJECTIVE_S,
                "idle_s": IDLE_S,
                "scale_down_s": IDLE_S,
                "replica_rate": REPLICA_PER_S,
                "replica_start_s": START_S + 10,
            }
        )
        os.environ["RAY_AUTH_MODE"] = "disabled"  # the cluster belongs to this benchmark alone, on loopback
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        await closing.enter_async_context(cluster(folder, backends.environment))
        progress("Ray runs")
        plan = serve_build.make_deploy_schema(settings)
        plan.applications[0].import_path = "benchmarks.scaling_cluster:build"
        serve.start(proxy_location="Disabled", logging_config=LOGGING_CONFIG)
        serve.context._get_global_client().deploy_apps(plan)
        await _wait_for_intake()
        progress("Intake runs")
        timeline = Timeline()
        await _drive(timeline, backends, progress)
        serve.shutdown()
        return timeline


async def _wait_for_intake() -> None:
    deadline = time.monotonic() + _UP_S
    while True:
        found = serve.status().applications[APPLICATION]
        states = found.deployments[INTAKE].replica_states if INTAKE in found.deployments else {}
        if states.get("RUNNING"):
            return
        if time.monotonic() > deadline or found.status == "DEPLOY_FAILED":
            raise RuntimeError(f"the application does not run: {found}")
        await asyncio.sleep(_POLL_S)


async def _drive(timeline: Timeline, backends: Backends, progress: Any) -> None:
    settings, address = backends.settings, backends.broker.address
    producer = await asyncio.to_thread(Producer, address, settings.submissions_stream)
    backlog = Backlog(address, settings.submissions_stream, settings.group)
    began = time.monotonic()
    reading = asyncio.create_task(_read(timeline, settings, began))
    watching = asyncio.create_task(_watch(timeline, backlog, began, progress))
    killing = [asyncio.create_task(_kill_node(kind, at_s, progress)) for kind, at_s in LOST_S.items()]
    try:
        number, due = 0, 0.0
        while (now_s := time.monotonic() - began) < BASE_S + SPIKE_S + AFTER_S:
            due += _TICK_S * (SPIKE_PER_S if BASE_S <= now_s < BASE_S + SPIKE_S else BASE_PER_S)
            for _ in range(int(due)):
                name = f"s-{number}"
                timeline.submitted[name] = time.monotonic() - began
                uri = f"s3://{BUCKET}/{number % 8}/{name}.jpg"
                sent = Submission(id=name, uri=uri, submitted_at=datetime.now(UTC))
                producer._producer.send(settings.submissions_stream, sent.model_dump_json().encode(), key=uri.encode())
                number, due = number + 1, due - 1
            await asyncio.sleep(max(0.0, began + now_s + _TICK_S - time.monotonic()))
        deadline = time.monotonic() + _END_S
        while time.monotonic() < deadline:
            last = timeline.samples[-1]
            if len(timeline.settled) == len(timeline.submitted) and not last.running and not last.nodes:
                break
            await asyncio.sleep(1)
        await asyncio.sleep(2)
    finally:
        for task in (reading, watching, *killing):
            task.cancel()
        await asyncio.gather(reading, watching, *killing, return_exceptions=True)
        await asyncio.to_thread(producer.close)
        await asyncio.to_thread(backlog.close)


async def _kill_node(kind: str, at_s: float, progress: Any) -> None:
    """SIGKILL every process of a node, as if its machine lost power."""
    await asyncio.sleep(at_s)
    alive = [each for each in await asyncio.to_thread(ray.nodes) if each["Alive"] and each["Resources"].get("CPU")]
    node = next(each for each in alive if ("GPU" in each["Resources"]) == (kind == "gpu"))
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("RAY_OVERRIDE_NODE_ID_FOR_TESTING") == node["NodeID"]:
                process.kill()
    progress(f"[{at_s:6.1f} s] a {kind} node is killed")


async def _read(timeline: Timeline, settings: Settings, began: float) -> None:
    reader = await open_reader(StreamConfig.from_settings(settings))
    try:
        async for message in reader.read(settings.verdicts_stream, follow=True):
            name = Verdict.model_validate_json(message.value).submission_id
            timeline.times[name] += 1
            timeline.settled.setdefault(name, time.monotonic() - began)
    finally:
        await reader.close()


async def _watch(timeline: Timeline, backlog: Backlog, began: float, progress: Any) -> None:
    while True:
        waiting = await asyncio.to_thread(backlog.read)
        deployments = (await asyncio.to_thread(serve.status)).applications[APPLICATION].deployments
        states = {
            name: Counter({str(k): v for k, v in each.replica_states.items()}) for name, each in deployments.items()
        }
        guard, intake = (
            Counter({key.split(".")[-1]: n for key, n in states[name].items()}) for name in ("Guard", INTAKE)
        )
        nodes = sum(
            each["Alive"] and each["Resources"].get("GPU", 0) > 0 for each in await asyncio.to_thread(ray.nodes)
        )
        sample = ClusterSample(
            at_s=time.monotonic() - began,
            backlog=waiting or 0,
            target=guard["RUNNING"] + guard["STARTING"] + guard["UPDATING"],
            running=guard["RUNNING"],
            nodes=nodes,
            intake=intake["RUNNING"],
        )
        last = timeline.samples[-1] if timeline.samples else None
        if last is None or (last.target, last.running, last.nodes) != (sample.target, sample.running, sample.nodes):
            progress(
                f"[{sample.at_s:6.1f} s] {sample.backlog:5d} wait; guard: {sample.target} requested, {sample.running} "
                f"ready; {sample.nodes} GPU nodes; {sample.intake} intake"
            )
        timeline.samples.append(sample)
        await asyncio.sleep(_POLL_S)


def main(chart: Path) -> dict[str, float | int]:
    """Run it, draw the chart, and return the figures."""

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    timeline = asyncio.run(run(progress))
    timeline.draw(chart)
    return timeline.figures()

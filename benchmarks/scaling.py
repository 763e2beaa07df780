"""The scaling decision: its cost and delays on a simulated day of load, and its effects on a cluster.

    python benchmarks/scaling.py --simulate [--seed 1] [--objective 300] [--json]
    python benchmarks/scaling.py --cluster [--chart FILE] [--json]

`--cluster`: see benchmarks/scaling_cluster.py. `--simulate`:

A day of 8.6 million submissions has unannounced spikes up to tenfold. Nodes take 2 to 8 minutes to start, and replicas
30 to 180 s more; spot nodes are lost. Sluice's decision is the function that production runs. It is compared with Ray
Serve's default and KEDA's lag rule, both with the best threshold for this very day, and with an oracle that knows the
day. Then the decision is timed in Ray Serve's own bookkeeping: 200 guard replicas, 1,000 partitions.
"""

import argparse
import gc
import json
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from ray.serve._private import autoscaling_metrics_codec
from ray.serve._private.autoscaling_state import ApplicationAutoscalingState
from ray.serve._private.common import (
    RUNNING_REQUESTS_KEY,
    DeploymentHandleSource,
    DeploymentID,
    HandleMetricReport,
    ReplicaID,
    ReplicaMetricReport,
    TimeStampedValue,
)
from ray.serve._private.config import DeploymentConfig
from ray.serve._private.constants import CONTROL_LOOP_INTERVAL_S
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve._private.utils import compress_metric_report, decompress_metric_report
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from pipelines.autoscaling import recorded_metrics, serve_config
from pipelines.autoscaling.replica_decision import ReplicaBounds
from pipelines.autoscaling.serve_config import autoscaling_config
from pipelines.autoscaling.simulation.day import SimulatedDay
from services.streams.base import Lag

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, Python searches benchmarks/ only
from benchmarks.scaling_comparison import Day, compare

GUARDS, PARTITIONS, MEMBERS = 200, 1000, 63
GUARD, INTAKE = DeploymentID("Guard", "sluice"), DeploymentID("Intake", "sluice")
DECISIONS, ITERATIONS = 100, 100
CALLS_REPORT_S = 10


def simulate(seed: int, objective_s: float) -> dict[str, float]:
    """Simulate a day and print its table; return the figures."""
    day = compare(seed, objective_s)
    print(f"seed {seed}, objective {objective_s:g} s, {int(day.sluice.arrived.sum()):,} submissions,", file=sys.stderr)
    print(
        f"{day.work_gpu_hours:.1f} GPU-hours of work, {1 - day.counted:.4f} of the minutes excluded\n", file=sys.stderr
    )
    print(f"{'':24}    p50    p95    p99   minutes  GPU-hours  actions", file=sys.stderr)
    ray, keda = day.ray[1], day.keda[1]
    for name, outcome in (
        ("Sluice", day.sluice),
        (f"Ray Serve, {day.ray[0].target_ongoing_requests:g} ongoing", ray),
        (f"KEDA, lag {day.keda[0].lag_threshold:g}", keda),
    ):
        waits = "  ".join(f"{outcome.percentile_s(share):5.0f}" for share in (0.5, 0.95, 0.99))
        rest = f"{day.within(outcome):8.4f} {outcome.gpu_hours:10.1f} {outcome.actions:8}"
        print(f"{name:24}  {waits}  {rest}", file=sys.stderr)
    print(f"{'oracle':24} {'':31} {day.oracle.gpu_hours:10.1f}\n", file=sys.stderr)
    return figures(day, ray, keda)


def figures(day: Day, ray: SimulatedDay, keda: SimulatedDay) -> dict[str, float]:
    """The figures of the JSON output: seconds, shares, and ratios of GPU-hours."""
    return {
        "minutes_within_objective": day.within(day.sluice),
        "minutes_excluded": 1 - day.counted,
        "gpu_hours": day.sluice.gpu_hours,
        "gpu_hours_vs_oracle": day.sluice.gpu_hours / day.oracle.gpu_hours,
        "gpu_hours_vs_ray_default": day.sluice.gpu_hours / ray.gpu_hours,
        "gpu_hours_vs_keda": day.sluice.gpu_hours / keda.gpu_hours,
        "p50_s": day.sluice.percentile_s(0.5),
        "p95_s": day.sluice.percentile_s(0.95),
        "p99_s": day.sluice.percentile_s(0.99),
        "p99_ray_default_s": ray.percentile_s(0.99),
        "p99_keda_s": keda.percentile_s(0.99),
        "actions": day.sluice.actions,
    }


class Controller:
    """Ray Serve's bookkeeping for 200 guard replicas and 63 intake replicas with 1,000 partitions."""

    def __init__(self, **rules: float) -> None:
        policy = AutoscalingPolicy(
            policy_function="pipelines.autoscaling.serve_policy:BacklogScaling", policy_kwargs=rules
        )
        self.state = ApplicationAutoscalingState("sluice")
        self.state.register(policy)
        self.targets = {GUARD: GUARDS, INTAKE: MEMBERS}
        self.replicas = {each: [ReplicaID(str(n), each) for n in range(count)] for each, count in self.targets.items()}
        guard, intake = (
            autoscaling_config(ReplicaBounds(0, 500), CALLS_REPORT_S),
            autoscaling_config(ReplicaBounds(1, PARTITIONS), serve_config.REPORT_INTERVAL_S),
        )
        for deployment, options in ((GUARD, guard), (INTAKE, intake)):
            config = DeploymentConfig(autoscaling_config=AutoscalingConfig(**options))
            info = DeploymentInfo(config, None, 0, "", version="1")  # type: ignore[arg-type]  # no replica is made
            self.state.register_deployment(deployment, info, self.targets[deployment])
            self.state.update_running_replica_ids(deployment, self.replicas[deployment])

    def report(self, second: int) -> float:
        """Hand over the report of every replica; return its CPU time in milliseconds. Every tenth one reports calls."""
        now_s, taken_s = time.time(), 0.0
        for member, replica in enumerate(self.replicas[INTAKE]):
            waiting = {each: 5 + each % 7 for each in range(PARTITIONS)}
            held = frozenset(range(member, PARTITIONS, MEMBERS))
            live = Lag(waiting, published=900 * second, partitions=PARTITIONS, owned_partitions=held)
            backfill = Lag({0: 10}, published=second, partitions=1, owned_partitions=frozenset({0}))
            values = recorded_metrics.encode({"live": live, "backfill": backfill}, at_guard=50)
            metrics = {
                name: self._points(now_s, value, serve_config.REPORT_INTERVAL_S) for name, value in values.items()
            }
            sent = compress_metric_report(ReplicaMetricReport(replica, metrics, now_s))
            started = time.thread_time()
            self.state.record_request_metrics_for_replica(decompress_metric_report(sent))
            taken_s += time.thread_time() - started
            if second % CALLS_REPORT_S == 0:
                sent = autoscaling_metrics_codec.encode(self._calls(member, now_s))
                started = time.thread_time()
                self.state.record_columnar_metrics_for_handle(autoscaling_metrics_codec.decode_handle_flat(sent))
                taken_s += time.thread_time() - started
        return taken_s * 1000

    def loop(self) -> float:
        """Run one iteration of the controller's autoscaling; return its CPU time in milliseconds."""
        started = time.thread_time()
        self.state.get_decision_num_replicas(self.targets)
        return (time.thread_time() - started) * 1000

    def _calls(self, member: int, now_s: float) -> HandleMetricReport:
        running = self._points(now_s, 2.0, CALLS_REPORT_S)
        replicas = self.replicas[GUARD][member % 4 :: 4]
        return HandleMetricReport(
            deployment_id=GUARD,
            handle_id=str(member),
            actor_id=str(member),
            handle_source=DeploymentHandleSource.REPLICA,
            queued_requests=self._points(now_s, 0.0, CALLS_REPORT_S),
            metrics={RUNNING_REQUESTS_KEY: {each.to_full_id_str(): running for each in replicas}},
            timestamp=now_s,
        )

    @staticmethod
    def _points(now_s: float, value: float, report_s: float) -> list[TimeStampedValue]:
        """Five points: Serve looks back a little longer than one report interval and records five times in it."""
        return [TimeStampedValue(now_s - ago * 0.24 * report_s, value) for ago in range(4, -1, -1)]


def time_decision() -> dict[str, float]:
    """Time a decision within Serve's bookkeeping, and the share of time that the controller is idle.

    Serve asks every 100 ms, and the policy decides once a second. The busy time includes the receipt of reports. Both
    are CPU time of the thread: the duration on an otherwise idle machine.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    always, usual = Controller(every_s=0), Controller()
    for controller in (always, usual):
        controller.report(0)
    gc.collect()
    gc.freeze()  # garbage of the imports must not be collected during a decision
    decisions_ms = []
    for second in range(DECISIONS):
        always.report(second)
        decisions_ms.append(always.loop())
    busy_ms = 0.0
    for iteration in range(ITERATIONS):
        if iteration % 10 == 0:
            busy_ms += usual.report(iteration // 10)
        busy_ms += usual.loop()
        time.sleep(CONTROL_LOOP_INTERVAL_S)
    gc.unfreeze()
    idle = 1 - busy_ms / (busy_ms + ITERATIONS * CONTROL_LOOP_INTERVAL_S * 1000)
    return {"decision_ms_200x1000": statistics.median(decisions_ms), "controller_idle_share": idle}


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.cluster:
        from benchmarks import scaling_cluster  # noqa: PLC0415 - it needs the backends of the tests

        return scaling_cluster.main(arguments.chart)
    return simulate(arguments.seed, arguments.objective) | time_decision()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--simulate", action="store_true", help="the simulated day; needs no cluster")
    which.add_argument("--cluster", action="store_true", help="ten times the load on a cluster of processes")
    parser.add_argument("--chart", type=Path, default=Path("docs/scaling-cluster.svg"), help="of the cluster")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--objective", type=float, default=300, help="seconds from submission to verdict")
    parser.add_argument("--json", action="store_true", help="end with one JSON line on stdout")
    given = parser.parse_args()
    found = {name: round(value, 4) for name, value in main(given).items()}
    print(json.dumps(found) if given.json else "\n".join(f"{name:<26} {value}" for name, value in found.items()))

"""The policy in Ray Serve's own bookkeeping, and unpickled in another process, as in Serve's controller."""

import logging
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle
from ray.serve._private.autoscaling_state import ApplicationAutoscalingState
from ray.serve._private.common import DeploymentID, ReplicaID, ReplicaMetricReport, TimeStampedValue
from ray.serve._private.config import DeploymentConfig
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from pipelines.autoscaling import serve_policy
from pipelines.autoscaling.replica_decision import ReplicaBounds
from pipelines.autoscaling.serve_config import REPORT_INTERVAL_S, autoscaling_config

GUARD, INTAKE = DeploymentID("Guard", "sluice"), DeploymentID("Intake", "sluice")


ANY_NUMBER = ReplicaBounds(0, 100)


def want_thirteen_guards(contexts: Mapping[Any, Any]) -> tuple[dict[Any, int], dict[Any, Any]]:
    """A policy that does nothing about Serve's cold start."""
    return {each: 13 for each, context in contexts.items() if context.deployment_name == "Guard"}, {}


class Controller:
    """The state that Serve's controller has of an application, without a cluster."""

    def __init__(
        self,
        guard_bounds: ReplicaBounds = ANY_NUMBER,
        policy: str = "pipelines.autoscaling.serve_policy:BacklogScaling",
        **rules: Any,
    ) -> None:
        self.state = ApplicationAutoscalingState("sluice")
        self.state.register(AutoscalingPolicy(policy_function=policy, policy_kwargs=rules))
        self.targets = {GUARD: guard_bounds.minimum, INTAKE: 1}
        for deployment, bounds in ((GUARD, guard_bounds), (INTAKE, ReplicaBounds(1, 12))):
            config = DeploymentConfig(
                autoscaling_config=AutoscalingConfig(**autoscaling_config(bounds, REPORT_INTERVAL_S))
            )
            info = DeploymentInfo(config, None, 0, "", version="1")  # type: ignore[arg-type]  # no replica is made of it
            self.state.register_deployment(deployment, info, self.targets[deployment])
        self.run(GUARD, guard_bounds.minimum)
        self.run(INTAKE, 1)

    def run(self, deployment: DeploymentID, count: int) -> None:
        self.state.update_running_replica_ids(deployment, [ReplicaID(str(n), deployment) for n in range(count)])

    def report(self, metrics: Mapping[str, float], *, at_s: float | None = None, replica: int = 0) -> None:
        at_s = at_s or time.time()
        points = {name: [TimeStampedValue(at_s, value)] for name, value in metrics.items()}
        self.state.record_request_metrics_for_replica(
            ReplicaMetricReport(ReplicaID(str(replica), INTAKE), points, at_s)
        )

    def decide(self) -> dict[DeploymentID, int]:
        self.targets |= self.state.get_decision_num_replicas(self.targets)
        return self.targets


def metrics(backlog: float, published: float, **more: float) -> dict[str, float]:
    return {"live_backlog": backlog, "live_published": published, "live_partitions": 12, "at_guard": 0} | more


def add_waiting_calls(controller: Controller, monkeypatch: pytest.MonkeyPatch, count: float) -> None:
    guard_state = controller.state._deployment_autoscaling_states[GUARD]
    monkeypatch.setattr(guard_state, "get_total_num_requests", lambda: count)


def test_serve_with_waiting_calls_scales_from_zero_in_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(every_s=0, replica_rate=5)
    add_waiting_calls(controller, monkeypatch, 64.0)
    now_s = time.time()
    controller.report(metrics(0, 1000), at_s=now_s - 2)
    controller.decide()
    controller.report(metrics(3000, 4000), at_s=now_s)
    assert controller.decide()[GUARD] > 10


def test_serve_with_waiting_calls_and_another_policy_starts_one_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails, Serve no longer replaces the policy's answer: remove `_bypass_cold_start`."""
    controller = Controller(policy=f"{__name__}:{want_thirteen_guards.__name__}")
    assert controller.decide()[GUARD] == 13
    controller = Controller(policy=f"{__name__}:{want_thirteen_guards.__name__}")
    add_waiting_calls(controller, monkeypatch, 64.0)
    assert controller.decide()[GUARD] == 1


def test_serve_without_load_scales_to_zero() -> None:
    controller = Controller(every_s=0, idle_s=10, scale_down_s=10)
    controller.targets[GUARD] = 3
    controller.run(GUARD, 3)
    for ago_s in range(20, 10, -2):
        controller.report(metrics(0, 1000), at_s=time.time() - ago_s)
        controller.decide()
        controller.run(GUARD, controller.targets[GUARD])
    assert controller.targets[GUARD] == 0


@pytest.mark.parametrize("case", ["nothing", "stale", "no rate", "not a number"])
def test_serve_without_current_numbers_keeps_the_replicas(case: str) -> None:
    controller = Controller(every_s=0)
    controller.targets[GUARD] = 7
    controller.run(GUARD, 7)
    if case == "stale":
        controller.report(metrics(1e6, 1e6), at_s=time.time() - 60)
    elif case == "no rate":
        controller.report({"live_backlog": 1e6})
    elif case == "not a number":
        controller.report(metrics(float("nan"), 1e6))
    assert controller.decide() == {GUARD: 7, INTAKE: 1}


def test_call_outside_the_stream_starts_a_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = Controller(every_s=0)
    add_waiting_calls(controller, monkeypatch, 1.0)
    for ago_s in (4, 2):
        controller.report(metrics(0, 1000), at_s=time.time() - ago_s)
        controller.decide()
    assert controller.targets[GUARD] == 1


def test_fault_is_logged_once_and_keeps_the_replicas(caplog: pytest.LogCaptureFixture) -> None:
    controller = Controller(every_s=0)
    controller.state.deregister_deployment(INTAKE)
    logger = logging.getLogger("ray.serve")
    logger.addHandler(caplog.handler)
    try:
        for _ in range(3):
            assert controller.state.get_decision_num_replicas({GUARD: 7}) == {}
    finally:
        logger.removeHandler(caplog.handler)
    assert sum("cannot decide on replicas" in record.message for record in caplog.records) == 1


def test_partitions_of_all_members_count() -> None:
    controller = Controller(every_s=0, replica_rate=5)
    controller.run(INTAKE, 2)
    now_s = time.time()
    controller.report(metrics(0, 0), at_s=now_s - 3)
    controller.decide()
    controller.report(metrics(5000, 5000) | {"live_backlog_0": 5000}, at_s=now_s - 1, replica=0)
    controller.report(metrics(5000, 5000) | {"live_backlog_1": 0}, at_s=now_s, replica=1)
    assert controller.decide()[INTAKE] == 12


def test_pickled_policy_imports_only_its_own_folder(tmp_path: Path) -> None:
    """As Serve does it: the policy's own module is pickled by value, other modules by their names."""
    cloudpickle.register_pickle_by_value(serve_policy)
    try:
        pickled = cloudpickle.dumps(serve_policy.BacklogScaling)
    finally:
        cloudpickle.unregister_pickle_by_value(serve_policy)
    file = tmp_path / "policy.pickle"
    file.write_bytes(pickled)
    program = """
import pickle, sys
from pathlib import Path
policy = pickle.loads(Path(sys.argv[1]).read_bytes())(objective_s=40)
assert policy({}) == ({}, {})
print(*sorted(name for name in sys.modules if name.partition(".")[0] in ("pipelines", "services")), sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {
        "pipelines",
        "pipelines.autoscaling",
        "pipelines.autoscaling.replica_decision",
        "pipelines.autoscaling.measurements",
        "pipelines.autoscaling.recorded_metrics",
    }

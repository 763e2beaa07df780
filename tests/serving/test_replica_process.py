"""The process of a replica as others see it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from pipelines.serving import replica_process
from pipelines.serving.replica_process import protect_replica
from tests.support.kernel import skip_without

ROOT = Path(__file__).parents[2]


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `protect_replica` has done, and the addresses on which Serve's replica then asks to listen."""
    steps: list[str] = []
    serve_replica = SimpleNamespace(add_port_to_grpc_server=lambda _, address: steps.append(address))
    monkeypatch.setattr(replica_process, "serve_replica", serve_replica)
    monkeypatch.setattr(replica_process, "forbid_tracing", lambda: steps.append("forbids tracing"))
    monkeypatch.setattr(replica_process.resource, "setrlimit", lambda *_: steps.append("dumps no core"))
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    return steps


@pytest.mark.parametrize(("node", "listens"), [("127.0.0.1", "127.0.0.1:0"), ("10.0.0.7", "[::]:0")])
def test_port_of_a_replica_is_on_loopback_where_the_cluster_is(
    node: str, listens: str, done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: node)
    protect_replica()
    add_port: Any = replica_process.serve_replica.add_port_to_grpc_server
    add_port(None, "[::]:0")
    assert done[-1] == listens


@pytest.mark.parametrize(
    ("landlock", "privileged", "forbids", "warns"),
    [(True, True, True, False), (True, False, False, False), (False, True, True, False), (False, False, True, True)],
)
def test_replica_forbids_tracing_unless_only_ray_would_be_kept_out(
    landlock: bool,
    privileged: bool,
    forbids: bool,
    warns: bool,
    done: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(replica_process, "can_confine", lambda: landlock)
    monkeypatch.setattr(replica_process, "_has_capability", lambda _: privileged)
    protect_replica()
    assert done == ["dumps no core", *(["forbids tracing"] if forbids else [])]
    assert ("no Landlock" in caplog.text) is warns


RAY_LOOKS = """
import ctypes, json, os, signal, sys
import psutil, ray
from ray.dashboard.modules.reporter.reporter_agent import PSUTIL_PROCESS_ATTRS, ReporterAgent
from pipelines.serving.replica_process import protect_replica
from services.core.processes import forbid_tracing

libc = ctypes.CDLL(None)
if os.getuid() == 0:
    os.setuid(65534)
libc.prctl(4, 1, 0, 0, 0)  # setuid has forbidden tracing
read, write = os.pipe()
if (pid := os.fork()) == 0:
    {"protect": protect_replica, "forbid": forbid_tracing}[sys.argv[1]]()
    own = {name: bool(open(f"/proc/self/{name}").read(1)) for name in ("status", "statm", "cgroup", "smaps_rollup")}
    os.write(write, json.dumps(own).encode())
    signal.pause()
own = json.loads(os.read(read, 4096))
try:
    agent = object.__new__(ReporterAgent)
    agent._ip = "127.0.0.1"
    stats = psutil.Process(pid).as_dict(attrs=PSUTIL_PROCESS_ATTRS)
    try:
        records = agent._generate_system_stats_record([stats], "replica")
        reported = {record.gauge.name: record.value for record in records}
    except TypeError as error:
        reported = {"error": str(error)}
    try:
        memory = len(open(f"/proc/{pid}/smaps_rollup").read())  # Ray's memory monitor reads it
    except PermissionError:
        memory = 0
finally:
    os.kill(pid, 9)
print(json.dumps({"own": own, "reported": reported, "memory": memory}))
"""


def look(mode: str) -> Any:
    """What an agent of Ray finds out about a replica, both as a user without capabilities."""
    done = subprocess.run(
        [sys.executable, "-c", RAY_LOOKS, mode],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_ray_measures_a_replica_of_a_user_without_capabilities() -> None:
    skip_without("landlock")
    seen = look("protect")
    assert all(seen["own"].values())
    assert seen["reported"]["component_num_fds"] > 0
    assert seen["reported"]["component_rss_bytes"] > 1 << 20
    assert seen["memory"] > 0


def test_ray_could_not_measure_a_replica_that_forbids_tracing() -> None:
    """The reason for the rule. If this fails, Ray has learnt it, and every replica can forbid tracing."""
    seen = look("forbid")
    assert all(seen["own"].values()), "the replica itself still reads the memory limit of its container"
    assert "NoneType" in seen["reported"]["error"]
    assert seen["memory"] == 0

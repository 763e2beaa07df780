"""The checks of this machine, with each fact broken in turn."""

import resource
import socket
import subprocess
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest

from pipelines.doctor import machine_checks
from pipelines.doctor.machine_checks import (
    GPU_CHECKS,
    SANDBOX_CHECKS,
    check_file_limit,
    check_sandbox,
    run_gpu_checks,
    run_port_checks,
    run_sandbox_checks,
)
from services.core.errors import ConfigurationError
from services.guard.gpu_memory import GIB
from services.guard.preflight import Gpu, GpuMachine
from services.images.decoder_sandbox import MEASURES
from tests.guard.test_preflight import BROKEN, GOOD
from tests.support.images import make_settings


def wrong(machine: GpuMachine, **settings: Any) -> dict[str, str]:
    results = list(run_gpu_checks(make_settings(**settings), lambda: machine))
    assert tuple(result.check for result in results) == GPU_CHECKS
    return {result.check: result.detail for result in results if not result.is_ok}


class TestGpu:
    @pytest.mark.parametrize("name", BROKEN)
    def test_broken_fact_is_named_by_its_check(self, name: str) -> None:
        check, machine, words = BROKEN[name]

        problems = wrong(machine)

        assert list(problems) == [f"gpu {check}"]
        assert words in problems[f"gpu {check}"]

    def test_machine_without_a_gpu_is_enough_for_tiny_and_too_little_for_a_large_model(self) -> None:
        assert wrong(GpuMachine()) == {}
        assert "too many for a CPU" in wrong(GpuMachine(), model="LlavaGuard-v1.2-7B-OV")["model memory"]

    def test_gpu_without_memory_for_the_model_is_named(self) -> None:
        machine = GpuMachine(**{**_fields(GOOD), "gpus": (Gpu("NVIDIA L4", int(22.5 * GIB), (8, 9)),)})

        problems = wrong(machine, model="LlavaGuard-v1.2-7B-OV")

        assert list(problems) == ["model memory"]
        assert "a guard has 22 GiB" in problems["model memory"]

    def test_guard_that_gets_no_gpu_needs_no_toolkit_and_a_small_model(self) -> None:
        machine = GpuMachine(gpus=GOOD.gpus, driver="580.95.05")

        assert wrong(machine, guard_gpus=0) == {}
        problems = wrong(machine, guard_gpus=0, model="LlavaGuard-v1.2-7B-OV")
        assert "too many for a CPU, and SLUICE_GUARD_GPUS is 0" in problems["model memory"]

    def test_requested_gpu_that_does_not_exist_is_named_once(self) -> None:
        problems = wrong(GpuMachine(), guard_gpus=1)

        assert "SLUICE_GUARD_GPUS is 1, and there is no NVIDIA GPU" in problems.pop("gpu")
        assert set(problems.values()) == {"not checked, because gpu failed"}

    def test_gpu_whose_driver_does_not_answer_is_named_unless_tiny_is_the_model(self) -> None:
        machine = GpuMachine(driver_problem="Driver/library version mismatch")

        problems = wrong(machine, model="LlavaGuard-v1.2-0.5B-OV")

        assert "Driver/library version mismatch): install driver 580 or newer and restart" in problems["gpu"]
        assert problems["model memory"] == "not checked, because gpu failed"
        assert wrong(machine) == {}
        assert "gpu" not in wrong(machine, model="LlavaGuard-v1.2-0.5B-OV", guard_gpus=0)

    def test_guards_on_another_cluster_are_not_checked_here(self) -> None:
        results = list(run_gpu_checks(make_settings(ray_address="head:6379"), lambda: pytest.fail("read this machine")))

        assert all("head:6379" in result.detail and result.is_ok for result in results)

    def test_machine_of_a_local_cluster_is_checked(self) -> None:
        _, machine, _ = BROKEN["no toolkit"]

        assert list(wrong(machine, ray_address="127.0.0.1:6379")) == ["gpu toolkit"]


def _fields(machine: GpuMachine) -> dict[str, Any]:
    return {name: getattr(machine, name) for name in GpuMachine.__slots__}


class TestPorts:
    def results(self, port: int, **settings: Any) -> dict[bool, str]:
        return {each.is_ok: each.detail for each in run_port_checks(make_settings(gateway_port=port, **settings))}

    def test_used_port_is_named(self) -> None:
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            assert "SLUICE_GATEWAY_PORT" in self.results(other.getsockname()[1])[False]

    def test_address_of_another_machine_is_named(self) -> None:
        assert "192.0.2.1:8080" in self.results(8080, gateway_host="192.0.2.1")[False]

    def test_gateway_that_already_runs_passes(self) -> None:
        class Gateway(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200 if self.path == "/healthz" else 404)
                self.end_headers()
                self.wfile.write(b'{"status":"ok"}')

            def log_message(self, *_: object) -> None:
                pass

        with HTTPServer(("127.0.0.1", 0), Gateway) as server:
            Thread(target=server.handle_request, daemon=True).start()
            assert "already listens" in self.results(server.server_address[1])[True]

    def test_no_gateway_needs_no_port(self) -> None:
        assert "no gateway" in self.results(1, gateway_replicas=0)[True]


@pytest.mark.parametrize(
    ("hard", "connections", "is_ok"),
    [(1024, 128, False), (65_536, 1024, True), (65_536, 100_000, False), (resource.RLIM_INFINITY, 100_000, True)],
)
def test_hard_limit_of_files_has_to_hold_the_connections(hard: int, connections: int, is_ok: bool) -> None:
    result = check_file_limit(make_settings(gateway_connections=connections), hard)

    assert result.is_ok is is_ok
    assert is_ok or f"may open {hard} files" in result.detail


@pytest.mark.parametrize("absent", MEASURES)
def test_absent_layer_of_the_sandbox_is_named(absent: str) -> None:
    results = list(check_sandbox([measure for measure in MEASURES if measure != absent]))

    assert tuple(result.check for result in results) == SANDBOX_CHECKS
    assert [result.check for result in results if not result.is_ok] == [f"sandbox {absent}"]


def test_layers_are_those_that_a_process_has_in_force() -> None:
    assert [result.is_ok for result in run_sandbox_checks(make_settings())] == [True] * len(MEASURES)


def test_layer_that_the_machine_refuses_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hard limit of 50 open files keeps a process without privileges from setting its limit to 64."""
    run = subprocess.run

    def run_limited(*arguments: Any, **options: Any) -> Any:
        limits = resource.RLIMIT_NOFILE, (50, 50)
        return run(*arguments, **options, preexec_fn=lambda: resource.setrlimit(*limits))

    monkeypatch.setattr(machine_checks.subprocess, "run", run_limited)

    problems = [result.check for result in run_sandbox_checks(make_settings()) if not result.is_ok]

    assert problems == ["sandbox rlimits"]


def test_process_that_cannot_enter_the_sandbox_is_told_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks, "_MEASURE_SANDBOX", "raise OSError('no such system call')")

    with pytest.raises(ConfigurationError, match=r"ends with status 1 \(OSError: no such system call\)"):
        list(run_sandbox_checks(make_settings()))

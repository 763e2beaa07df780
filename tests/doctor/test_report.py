"""How checks run together: one that hangs, one that raises, and the ones that stop `sluice up`."""

import os
import socket
import threading
from collections.abc import Iterator

import pytest

from pipelines.doctor import machine_checks, report
from pipelines.doctor.checks import CheckResult, Probe, failed, passed
from pipelines.doctor.report import PROBES, check_before_start, diagnose, run_probes
from pipelines.doctor.settings_check import ReadSettings
from services.core.errors import ConfigurationError, StoreUnavailable
from services.core.settings import Settings
from services.guard.gpu_memory import GIB
from services.guard.preflight import Gpu, GpuMachine
from tests.support.images import make_settings


def run(*probes: Probe, deadline_s: float = 10) -> list[tuple[str, bool, str]]:
    results = run_probes(probes, ReadSettings(make_settings(), {}), deadline_s=deadline_s)
    return [(result.check, result.is_ok, result.detail) for result in results]


def succeed(_: Settings) -> Iterator[CheckResult]:
    yield passed("good", "fine")


def test_hanging_check_fails_after_the_deadline_and_hides_no_other() -> None:
    ended = threading.Event()

    def hang(_: Settings) -> Iterator[CheckResult]:
        yield passed("first", "fine")
        ended.wait(60)

    results = run(Probe(("first", "second", "third"), hang), Probe(("good",), succeed), deadline_s=0.5)
    ended.set()

    assert [(check, is_ok) for check, is_ok, _ in results] == [
        ("first", True),
        ("second", False),
        ("third", False),
        ("good", True),
    ]
    assert "no result within 0.5 s" in results[1][2]


def test_error_fails_the_next_check_and_skips_the_later_ones() -> None:
    def fail(_: Settings) -> Iterator[CheckResult]:
        yield passed("first", "fine")
        raise StoreUnavailable("the object store does not answer")

    assert run(Probe(("first", "second", "third"), fail)) == [
        ("first", True, "fine"),
        ("second", False, "the object store does not answer"),
        ("third", False, "not checked, because second failed"),
    ]


def test_probe_that_ends_after_a_failed_check_skips_the_later_ones() -> None:
    def stop(_: Settings) -> Iterator[CheckResult]:
        yield failed("first", "too old")

    assert run(Probe(("first", "second"), stop)) == [
        ("first", False, "too old"),
        ("second", False, "not checked, because first failed"),
    ]


def test_error_after_a_failed_check_is_told_too() -> None:
    def fail(_: Settings) -> Iterator[CheckResult]:
        yield failed("first", "too old")
        raise StoreUnavailable("the object store does not answer")

    assert run(Probe(("first", "second", "third"), fail))[1:] == [
        ("second", False, "the object store does not answer"),
        ("third", False, "not checked, because second failed"),
    ]


def test_probe_that_yields_too_little_is_a_failed_check() -> None:
    ((check, is_ok, detail),) = run(Probe(("only",), lambda _: iter(())))

    assert (check, is_ok) == ("only", False)
    assert "yielded no result" in detail


def test_unexpected_error_is_a_failed_check() -> None:
    def fail(_: Settings) -> Iterator[CheckResult]:
        raise RuntimeError("a fault of Sluice")

    ((_, is_ok, detail),) = run(Probe(("only",), fail))

    assert not is_ok
    assert "RuntimeError: a fault of Sluice" in detail


def test_checks_run_at_the_same_time() -> None:
    barrier = threading.Barrier(3, timeout=10)

    def meet(_: Settings) -> Iterator[CheckResult]:
        barrier.wait()
        yield passed("met", "fine")

    assert all(is_ok for _, is_ok, _ in run(*[Probe(("met",), meet)] * 3))


def test_every_check_has_a_name_of_its_own() -> None:
    names = ["settings", *(check for probe in PROBES for check in probe.checks)]
    assert len(set(names)) == len(names)


def test_settings_come_first_even_if_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("STREAM_URL", "REDIS_URL", "S3_BUCKETS", "POLICY_BUCKET", "MODEL"):
        monkeypatch.delenv(f"SLUICE_{variable}", raising=False)

    first, *others = diagnose([Probe(("stream",), succeed, needs=("stream_url",))])

    assert (first.check, first.is_ok) == ("settings", False)
    assert [(other.is_ok, other.detail) for other in others] == [
        (False, "not checked, because SLUICE_STREAM_URL is not set; set it")
    ]


def make_gpu_probe(machine: GpuMachine) -> Probe:
    """The checks of the GPU, on a pretended machine."""

    def run_on(settings: Settings) -> Iterator[CheckResult]:
        return machine_checks.run_gpu_checks(settings, lambda: machine)

    return Probe(machine_checks.GPU_CHECKS, run_on, is_local=True, blocks_start=True)


class TestBeforeStart:
    def test_sound_machine_has_no_problem_and_takes_less_than_two_seconds_of_work(self) -> None:
        """Time of processors, with that of the child processes, because other tests may keep this machine busy."""
        before = sum(os.times()[:4])

        assert check_before_start(make_settings(gateway_port=0)) == []

        assert sum(os.times()[:4]) - before < 2

    def test_machine_whose_gpu_cannot_be_used_stops_the_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = GpuMachine(gpus=(Gpu("NVIDIA L4", 22 * GIB, (8, 9)),), driver="580.95.05")
        monkeypatch.setattr(report, "PROBES", (make_gpu_probe(machine),))

        with pytest.raises(ConfigurationError, match=r"nvcc is not installed.*install g\+\+.*Python\.h"):
            check_before_start(make_settings())

    def test_check_that_did_not_run_is_no_cause(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(_: Settings) -> Iterator[CheckResult]:
            raise StoreUnavailable("the cause")
            yield

        monkeypatch.setattr(report, "PROBES", (Probe(("first", "second"), fail, is_local=True),))

        assert [problem.check for problem in check_before_start(make_settings())] == ["first"]

    def test_used_port_and_unusable_gpu_are_told_in_one_sentence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = GpuMachine(driver_problem="Driver Not Loaded")
        monkeypatch.setattr(report, "PROBES", [make_gpu_probe(machine), *PROBES])
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            chosen = make_settings(guard_gpus=1, gateway_port=other.getsockname()[1])

            with pytest.raises(
                ConfigurationError, match=r"(?s)\A[^\n]*Driver Not Loaded[^\n]*SLUICE_GATEWAY_PORT[^\n]*\Z"
            ):
                check_before_start(chosen)

    def test_absent_layer_of_the_sandbox_is_reported_and_stops_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        probe = Probe(machine_checks.SANDBOX_CHECKS, lambda _: machine_checks.check_sandbox(["seccomp"]), is_local=True)
        monkeypatch.setattr(report, "PROBES", (probe,))

        problems = check_before_start(make_settings())

        assert len(problems) == len(machine_checks.SANDBOX_CHECKS) - 1

    def test_backends_are_not_asked(self) -> None:
        """`sluice up` waits for backends that start at the same time."""
        local = [check for probe in PROBES if probe.is_local for check in probe.checks]
        assert not any(check.startswith(("stream", "redis", "bucket", "policy")) for check in local)

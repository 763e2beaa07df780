"""Runs all checks at the same time, each with a deadline, and yields their results in a fixed order."""

import threading
import time
from collections.abc import Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Final

from pipelines.doctor.bucket_checks import run_bucket_checks, run_policy_bucket_checks
from pipelines.doctor.checks import CheckResult, Probe, failed, skipped
from pipelines.doctor.kafka_checks import run_kafka_checks
from pipelines.doctor.machine_checks import (
    GPU_CHECKS,
    SANDBOX_CHECKS,
    run_file_limit_checks,
    run_gpu_checks,
    run_port_checks,
    run_sandbox_checks,
)
from pipelines.doctor.model_checks import run_model_checks
from pipelines.doctor.redis_checks import run_redis_checks, run_redis_stream_checks
from pipelines.doctor.settings_check import ReadSettings, read_settings
from services.core.errors import ConfigurationError, SluiceError
from services.core.settings import Settings

DEADLINE_S: Final = 30.0
"""For all checks together, because they run at the same time."""
LOCAL_DEADLINE_S: Final = 10.0
"""Local checks take less than 2 s. On a busy machine they may take longer, and still decide."""


def _run_stream_checks(settings: Settings) -> Iterator[CheckResult]:
    run = run_kafka_checks if settings.stream_url.startswith("kafka://") else run_redis_stream_checks
    return run(settings)


PROBES: Final = (
    Probe(("stream", "stream version", "stream topics", "stream rights"), _run_stream_checks, ("stream_url",)),
    Probe(("redis", "redis persistence", "redis eviction"), run_redis_checks, ("redis_url",)),
    Probe(("buckets",), run_bucket_checks, ("s3_buckets",)),
    Probe(("policy bucket", "policy bucket writes", "clock"), run_policy_bucket_checks, ("policy_bucket",)),
    Probe(("model", "model disk"), run_model_checks, ("model",)),
    Probe(GPU_CHECKS, run_gpu_checks, is_local=True, blocks_start=True),
    Probe(("ports",), run_port_checks, is_local=True, blocks_start=True),
    Probe(("file limits",), run_file_limit_checks, is_local=True),
    Probe(SANDBOX_CHECKS, run_sandbox_checks, is_local=True),
)


def diagnose(probes: Sequence[Probe] = PROBES, *, deadline_s: float = DEADLINE_S) -> Iterator[CheckResult]:
    """Run every check, and yield the result of the settings first, then those of the probes in their order."""
    read = read_settings()
    yield read.result()
    yield from run_probes(probes, read, deadline_s=deadline_s)


def run_probes(probes: Sequence[Probe], read: ReadSettings, *, deadline_s: float) -> Iterator[CheckResult]:
    """Run probes at the same time, and yield one result for each of their checks."""
    ends_at = time.monotonic() + deadline_s
    running = [_start(probe, read) for probe in probes]
    for probe, results in zip(probes, running, strict=True):
        for check in probe.checks:
            try:
                yield results.get(timeout=max(0.0, ends_at - time.monotonic()))
            except Empty:
                yield failed(check, f"no result within {deadline_s:g} s: the check hangs; run it again")


def check_before_start(settings: Settings) -> list[CheckResult]:
    """Run the local checks, for `sluice up`, and return those that failed.

    Raises:
        ConfigurationError: one failed without which the service cannot become ready.
    """
    local = [probe for probe in PROBES if probe.is_local]
    results = run_probes(local, ReadSettings(settings, {}), deadline_s=LOCAL_DEADLINE_S)
    problems = [result for result in results if not result.is_ok and not result.is_skipped]
    blocking = {check for probe in local if probe.blocks_start for check in probe.checks}
    if fatal := [result.detail for result in problems if result.check in blocking]:
        raise ConfigurationError(f"this machine cannot run the service: {'; '.join(fatal)}")
    return problems


def _start(probe: Probe, read: ReadSettings) -> "SimpleQueue[CheckResult]":
    """Run a probe in a thread that does not keep this process alive. The queue gets one result for each check."""
    results: SimpleQueue[CheckResult] = SimpleQueue()

    def run() -> None:
        checks = iter(probe.checks)
        if missing := read.explain_missing(probe.needs):
            for check in checks:
                results.put(failed(check, missing))
            return
        cause = problem = ""
        try:
            for result in probe.run(read.settings):
                results.put(result)
                next(checks)
                cause = "" if result.is_ok else result.check
        except SluiceError as error:
            problem = str(error)
        except Exception as error:  # noqa: BLE001 - a failed check must not hide the results of the others
            problem = f"the check failed: {type(error).__name__}: {error}; report this"
        for check in checks:
            if problem or not cause:
                results.put(failed(check, problem or "it yielded no result; report this"))
                cause, problem = check, ""
            else:
                results.put(skipped(check, cause))

    threading.Thread(target=run, name=f"doctor-{probe.checks[0]}", daemon=True).start()
    return results

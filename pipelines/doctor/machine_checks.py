"""Checks of this machine: its GPU, the ports, the limit of open files, and the sandbox of the decoders."""

import http.client
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Final

from pipelines.doctor.checks import CheckResult, explain_elsewhere, failed, passed, runs_elsewhere, skipped
from pipelines.doctor.model_checks import check_model_memory
from services.core.errors import ConfigurationError
from services.core.settings import Settings
from services.guard.preflight import CHECKS, DRIVER_MINIMUM, GpuMachine, read_machine
from services.images.decoder_sandbox import MEASURES

GPU_CHECKS: Final = ("gpu", *(f"gpu {name}" for name in CHECKS), "model memory")
SANDBOX_CHECKS: Final = tuple(f"sandbox {measure}" for measure in MEASURES)
FILES_MINIMUM: Final = 4_096
"""Ray's processes open a few files for each worker and connection."""

_OTHER_FILES: Final = 512
"""Open files of a gateway replica that are not connections."""
_ANSWER_S: Final = 2.0
_SANDBOX_S: Final = 20.0
_ROOT: Final = Path(__file__).parents[2]
_MEASURE_SANDBOX: Final = "from services.images.decoder_sandbox import enter; print(*enter())"
_SANDBOX_REMEDIES: Final = {
    "capabilities": "run Sluice without a security module that forbids capset",
    "no_new_privs": "use Linux 3.5 or newer",
    "landlock": "use Linux 5.13 or newer with `landlock` in its list of security modules (lsm=), and a container "
    "runtime whose seccomp profile allows it",
    "seccomp": "use a kernel with CONFIG_SECCOMP_FILTER on x86-64 or 64-bit ARM",
    "rlimits": "raise the hard limit of open files to 64 or more",
}


def run_gpu_checks(settings: Settings, read: Callable[[], GpuMachine] = read_machine) -> Iterator[CheckResult]:
    """Yield the results of `GPU_CHECKS`."""
    if runs_elsewhere(settings):
        yield from (passed(check, explain_elsewhere(settings)) for check in GPU_CHECKS)
        return
    machine = read()
    presence = check_presence(settings, machine)
    yield presence
    for name, check_fact in CHECKS.items():
        if machine.gpus and settings.guard_gpus != 0:
            finding = check_fact(machine)
            yield CheckResult(f"gpu {name}", finding.is_ok, finding.detail)
        elif presence.is_ok:
            yield passed(f"gpu {name}", "not needed without a GPU")
        else:
            yield skipped(f"gpu {name}", "gpu")
    if not presence.is_ok:
        yield skipped("model memory", "gpu")
    elif not settings.model:
        yield failed("model memory", "not checked, because SLUICE_MODEL is not set; set it")
    else:
        yield check_model_memory(settings, machine)


def check_presence(settings: Settings, machine: GpuMachine) -> CheckResult:
    """The result of `gpu`: whether there is a GPU, or the model runs on the CPU as it should."""
    if settings.guard_gpus == 0:
        return passed("gpu", "guards get no GPU (SLUICE_GUARD_GPUS=0)")
    if machine.gpus:
        return passed("gpu", ", ".join(gpu.name for gpu in machine.gpus))
    if machine.driver_problem:
        found = (
            f"this machine has an NVIDIA GPU, but NVIDIA's driver does not answer ({machine.driver_problem}): install "
            f"driver {DRIVER_MINIMUM} or newer and restart the machine, or give the container the GPU"
        )
    else:
        hidden = " that CUDA_VISIBLE_DEVICES leaves visible" if "CUDA_VISIBLE_DEVICES" in os.environ else ""
        found = f"there is no NVIDIA GPU{hidden}"
    if settings.guard_gpus:
        return failed("gpu", f"SLUICE_GUARD_GPUS is {settings.guard_gpus:g}, and {found}; without one, set it to 0")
    if machine.driver_problem and settings.model != "tiny":
        return failed("gpu", f"{found}. To judge on the CPU instead, set SLUICE_GUARD_GPUS=0")
    return passed("gpu", f"{found}; the model runs on the CPU if it is small enough")


def run_port_checks(settings: Settings) -> Iterator[CheckResult]:
    """Yield the result of `ports`."""
    host, port = settings.gateway_host, settings.gateway_port
    if not settings.gateway_replicas:
        yield passed("ports", "no gateway (SLUICE_GATEWAY_REPLICAS=0), so no port is needed")
    elif runs_elsewhere(settings):
        yield passed("ports", f"not checked: gateways listen on the nodes of {settings.ray_address}")
    elif port == 0:
        yield passed("ports", "the gateway takes a free port")
    else:
        try:
            check_port_free(host, port)
        except ConfigurationError as error:
            if _is_gateway(host, port):
                yield passed("ports", f"a gateway of Sluice already listens on {host}:{port}")
            else:
                yield failed("ports", str(error))
        else:
            yield passed("ports", f"{host}:{port} is free for the gateway")


def check_port_free(host: str, port: int) -> None:
    """Bind without SO_REUSEPORT, so that a port that another service uses is an error.

    Raises:
        ConfigurationError: the gateway cannot listen there.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigurationError(
                f"the gateway cannot listen on {host}:{port} ({error.strerror}); set SLUICE_GATEWAY_HOST and "
                "SLUICE_GATEWAY_PORT to an address of this machine that is free, or SLUICE_GATEWAY_REPLICAS=0 for none"
            ) from None


def run_file_limit_checks(settings: Settings) -> Iterator[CheckResult]:
    """Yield the result of `file limits`."""
    yield check_file_limit(settings, resource.getrlimit(resource.RLIMIT_NOFILE)[1])


def check_file_limit(settings: Settings, hard: int) -> CheckResult:
    """Check the hard limit of open files. Processes raise their soft limit themselves."""
    gateway = settings.gateway_connections + _OTHER_FILES if settings.gateway_replicas else 0
    wanted = max(FILES_MINIMUM, gateway)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        return failed(
            "file limits",
            f"a process may open {hard} files, and Sluice needs {wanted}: raise the hard limit (`ulimit -Hn`, "
            "LimitNOFILE of systemd, `--ulimit nofile` of Docker)",
        )
    return passed("file limits", f"a process may open {'any number of' if hard < 0 else hard} files")


def run_sandbox_checks(_settings: Settings) -> Iterator[CheckResult]:
    """Yield the results of `SANDBOX_CHECKS`, of a process that enters the sandbox."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _MEASURE_SANDBOX],
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=_SANDBOX_S,
            env={"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(_ROOT)},
        )
    except subprocess.TimeoutExpired:
        raise ConfigurationError(
            f"a process did not enter the sandbox within {_SANDBOX_S:g} s: run this again when the machine is less busy"
        ) from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ConfigurationError(f"a process that enters the sandbox ends with status {done.returncode} ({reason})")
    yield from check_sandbox(done.stdout.split())


def check_sandbox(in_force: Collection[str]) -> Iterator[CheckResult]:
    """Compare the measures in force with all that there are."""
    for measure in MEASURES:
        if measure in in_force:
            yield passed(f"sandbox {measure}", "in force in decoder processes")
        else:
            yield failed(
                f"sandbox {measure}",
                f"not in force, so a hostile image that takes over a decoder can do more: {_SANDBOX_REMEDIES[measure]}",
            )


def _is_gateway(host: str, port: int) -> bool:
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    connection = http.client.HTTPConnection(reached, port, timeout=_ANSWER_S)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().read(64) == b'{"status":"ok"}'
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()

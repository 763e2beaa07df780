"""What the engine needs of a machine with a GPU: checks over facts, one sentence each.

SGLang, FlashInfer and Triton compile kernels for the GPU of the machine. So they need more than NVIDIA's driver: nvcc,
a C and a C++ compiler, and the headers of Python. Without one of them, the engine ends with a traceback of a library
after minutes, so Sluice looks first. `sluice doctor` shows every check. A guard replica with a failed check does not
start its engine.
"""

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pynvml  # nvidia-ml-py, which SGLang brings along

from services.core.errors import ConfigurationError
from services.guard.checkpoints import Checkpoint
from services.guard.gpu_memory import GIB
from services.guard.gpus import describe_need, find_visible_gpus, is_cuda_available

DRIVER_MINIMUM: Final = 580
"""The first branch of NVIDIA's driver that runs CUDA 13, which the wheels of PyTorch and SGLang are built with."""
CUDA_MAJOR: Final = 13
CAPABILITY_MINIMUM: Final = (8, 0)
"""SGLang's compiled kernels begin with this compute capability (Ampere). A T4 (7.5) and a V100 (7.0) are older."""

_NVCC_DEADLINE_S: Final = 10.0
_CUDA_FOLDER: Final = Path("/usr/local/cuda")
_PCI_FOLDER: Final = Path("/sys/bus/pci/devices")
_NVIDIA: Final = "0x10de"
_DISPLAY_CONTROLLER: Final = "0x03"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One NVIDIA GPU, as its driver describes it."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    """CUDA's compute capability."""


@dataclass(frozen=True, slots=True)
class GpuMachine:
    """The facts that the checks are about."""

    gpus: tuple[Gpu, ...] = ()
    """Those that CUDA_VISIBLE_DEVICES leaves visible, in its order."""
    driver: str = ""
    """Its version, for example `580.95.05`; empty: there is none."""
    driver_problem: str = ""
    """Why the driver does not answer although the machine has an NVIDIA GPU; empty: it answers, or there is no GPU."""
    is_usable_by_pytorch: bool = True
    """PyTorch was asked only if the driver is old: with NVIDIA's package for compatibility it can work all the same."""
    nvcc: str = ""
    """The path of the CUDA compiler; empty: there is none."""
    cuda_release: str = ""
    """The release of nvcc, for example `13.0`; empty: it does not run."""
    c_compiler: str = ""
    cpp_compiler: str = ""
    python_header: str = ""
    """The path of Python.h; empty: it is not installed."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check: `detail` says what was found, or what is wrong and what to do."""

    is_ok: bool
    detail: str


def check_driver(machine: GpuMachine) -> Finding:
    major = int(match[0]) if (match := re.match(r"\d+", machine.driver)) else 0
    if major >= DRIVER_MINIMUM or machine.is_usable_by_pytorch:
        return Finding(True, f"driver {machine.driver}")
    return Finding(
        False,
        f"NVIDIA's driver {machine.driver} is too old for CUDA {CUDA_MAJOR}, so PyTorch cannot use the GPU: install "
        f"driver {DRIVER_MINIMUM} or newer",
    )


def check_capability(machine: GpuMachine) -> Finding:
    for gpu in machine.gpus:
        if gpu.capability < CAPABILITY_MINIMUM:
            return Finding(
                False,
                f"{gpu.name} has the compute capability {_dotted(gpu.capability)}, and SGLang's kernels need "
                f"{_dotted(CAPABILITY_MINIMUM)} or higher: use an A10, L4, L40S, A100, H100 or newer GPU",
            )
    return Finding(True, ", ".join(f"compute capability {_dotted(each)}" for each in _capabilities(machine)))


def check_toolkit(machine: GpuMachine) -> Finding:
    remedy = f"install NVIDIA's package cuda-toolkit-{CUDA_MAJOR}-0, or set CUDA_HOME to the folder of the toolkit"
    if not machine.nvcc:
        return Finding(
            False, f"nvcc is not installed, and the engine compiles kernels with nvcc {CUDA_MAJOR}: {remedy}"
        )
    if not machine.cuda_release:
        return Finding(False, f"{machine.nvcc} does not run, and the engine compiles kernels with it: {remedy}")
    if machine.cuda_release.partition(".")[0] != str(CUDA_MAJOR):
        return Finding(
            False,
            f"{machine.nvcc} is of CUDA {machine.cuda_release}, and the engine needs CUDA {CUDA_MAJOR}: {remedy}",
        )
    return Finding(True, f"{machine.nvcc} of CUDA {machine.cuda_release}")


def check_compiler(machine: GpuMachine) -> Finding:
    if not machine.c_compiler or not machine.cpp_compiler:
        lacking = "a C and a C++" if not machine.c_compiler else "a C++"
        return Finding(
            False, f"{lacking} compiler is not installed, and the engine compiles kernels with it: install g++"
        )
    return Finding(True, f"{machine.c_compiler}, {machine.cpp_compiler}")


def check_python_headers(machine: GpuMachine) -> Finding:
    if not machine.python_header:
        return Finding(
            False,
            f"Python.h of Python {sysconfig.get_python_version()} is not installed, and Triton compiles kernels with "
            f"it: install python{sysconfig.get_python_version()}-dev",
        )
    return Finding(True, machine.python_header)


def check_memory(machine: GpuMachine, checkpoint: Checkpoint, guard_gpus: float | None) -> Finding:
    """Check that the GPUs of one replica hold the checkpoint.

    `guard_gpus` is the setting. Unset means 1.
    """
    wanted = 1.0 if guard_gpus is None else guard_gpus
    share = min(1.0, wanted)
    memory = [int(gpu.memory_bytes * share) for gpu in machine.gpus[: max(1, int(wanted))]]
    used = checkpoint.tensor_parallel_size(memory)
    have = " + ".join(f"{each / GIB:.0f}" for each in memory)
    if not used:
        return Finding(
            False,
            f"{describe_need(checkpoint)}, and a guard has {have} GiB: {_suggest(machine, checkpoint)}",
        )
    idle = f"; a guard leaves {len(memory) - used} of its {len(memory)} GPUs idle" if used < len(memory) else ""
    return Finding(
        True, f"{checkpoint.name} needs {checkpoint.gpu_memory_bytes / GIB:.0f} GiB, a guard has {have} GiB{idle}"
    )


CHECKS: Final[Mapping[str, Callable[[GpuMachine], Finding]]] = {
    "driver": check_driver,
    "capability": check_capability,
    "toolkit": check_toolkit,
    "compiler": check_compiler,
    "python headers": check_python_headers,
}
"""Every check that is not about a checkpoint."""


def require_gpu_machine(machine: GpuMachine) -> None:
    """Check the machine before an engine starts on its GPUs. A machine without a GPU passes.

    Raises:
        ConfigurationError: the engine could not start; the sentence names every cause.
    """
    if not machine.gpus:
        return
    findings = [check(machine) for check in CHECKS.values()]
    if problems := [finding.detail for finding in findings if not finding.is_ok]:
        raise ConfigurationError(
            f"The engine cannot use the GPU of this machine: {'; '.join(problems)}. To run a small model on the CPU "
            "instead, hide the GPU (CUDA_VISIBLE_DEVICES=)."
        )


def read_machine(environment: Mapping[str, str] = os.environ) -> GpuMachine:
    """Read the facts. Blocks for up to a second, longer if the driver is old."""
    driver, gpus, problem = _read_gpus(environment)
    if not gpus:
        return GpuMachine(driver=driver, driver_problem=problem)
    nvcc = find_nvcc(environment)
    is_new = bool(re.match(r"\d+", driver)) and int(driver.partition(".")[0]) >= DRIVER_MINIMUM
    return GpuMachine(
        gpus=gpus,
        driver=driver,
        is_usable_by_pytorch=is_new or is_cuda_available(),
        nvcc=nvcc,
        cuda_release=read_cuda_release(nvcc) if nvcc else "",
        c_compiler=_find_program(environment, environment.get("CC"), "cc", "gcc", "clang"),
        cpp_compiler=_find_program(environment, environment.get("CXX"), "c++", "g++", "clang++"),
        python_header=find_python_header(),
    )


def find_nvcc(environment: Mapping[str, str], folder: Path = _CUDA_FOLDER) -> str:
    """The nvcc that PyTorch would use: of CUDA_HOME, else of PATH, else in `folder`; empty if there is none."""
    home = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    if home:
        return _find_program(environment, str(Path(home) / "bin" / "nvcc"))
    return _find_program(environment, "nvcc", str(folder / "bin" / "nvcc"))


def read_cuda_release(nvcc: str) -> str:
    """The release of a CUDA compiler, for example `13.0`; empty if it does not run."""
    try:
        done = subprocess.run(
            [nvcc, "--version"],
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=_NVCC_DEADLINE_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    release = re.search(r"release (\d+\.\d+)", done.stdout)
    return release[1] if release and done.returncode == 0 else ""


def find_python_header() -> str:
    """The path of Python.h for the Python that runs, or an empty string."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return str(header) if header.is_file() else ""


def _find_program(environment: Mapping[str, str], *names: str | None) -> str:
    found = (shutil.which(name.split()[0], path=environment.get("PATH", "")) for name in names if name and name.strip())
    return next(filter(None, found), "")


def has_nvidia_gpu(folder: Path = _PCI_FOLDER) -> bool:
    """Whether a display controller of NVIDIA is on the PCI bus, with or without a driver."""
    for device in folder.glob("*"):
        try:
            kinds = (device / "vendor").read_text().strip(), (device / "class").read_text()
        except OSError:
            continue
        if kinds[0] == _NVIDIA and kinds[1].startswith(_DISPLAY_CONTROLLER):
            return True
    return False


def _read_gpus(environment: Mapping[str, str]) -> tuple[str, tuple[Gpu, ...], str]:
    """The version of the driver, the visible GPUs, and why the driver of a GPU does not answer."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        is_wanted = environment.get("CUDA_VISIBLE_DEVICES") != ""
        return "", (), str(error).rstrip(".") if is_wanted and has_nvidia_gpu() else ""
    try:
        gpus = tuple(_describe(handle) for handle in find_visible_gpus(environment))
        return str(pynvml.nvmlSystemGetDriverVersion()), gpus, ""
    except pynvml.NVMLError as error:
        return "", (), str(error).rstrip(".")
    finally:
        pynvml.nvmlShutdown()


def _describe(handle: object) -> Gpu:
    try:
        capability = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    except pynvml.NVMLError:  # A part of a GPU (MIG) may have none of its own.
        whole = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
        capability = pynvml.nvmlDeviceGetCudaComputeCapability(whole)
    return Gpu(
        str(pynvml.nvmlDeviceGetName(handle)),
        int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        tuple(capability),
    )


def _capabilities(machine: GpuMachine) -> list[tuple[int, int]]:
    return sorted({gpu.capability for gpu in machine.gpus})


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _suggest(machine: GpuMachine, checkpoint: Checkpoint) -> str:
    """How this machine could hold the checkpoint, or what else to do."""
    if count := checkpoint.tensor_parallel_size([gpu.memory_bytes for gpu in machine.gpus]):
        return f"set SLUICE_GUARD_GPUS={count}"
    return "choose a smaller checkpoint (SLUICE_MODEL), or a machine with larger or more GPUs"

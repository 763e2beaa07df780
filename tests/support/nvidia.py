"""A pretended NVIDIA driver with its GPUs, and the tools of a machine on which the engine can compile."""

import stat
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest

from services.guard.gpu_memory import GIB
from services.guard.preflight import Gpu


class Driver:
    """What NVML answers. A test may change it."""

    def __init__(self) -> None:
        self.version = "580.95.05"
        self.gpus = [Gpu("NVIDIA L40S", int(44.7 * GIB), (8, 9))]
        self.error = 0
        """The code with which NVML refuses to start; 0: it starts."""

    def start(self) -> None:
        if self.error:
            raise pynvml.NVMLError(self.error)

    def by_index(self, index: int) -> Gpu:
        if not 0 <= index < len(self.gpus):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return self.gpus[index]


@pytest.fixture
def nvidia_driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """A driver of release 580 with one L40S. A UUID ends with the index of its GPU."""
    driver = Driver()
    answers = {
        "nvmlInit": driver.start,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: driver.version,
        "nvmlDeviceGetCount": lambda: len(driver.gpus),
        "nvmlDeviceGetHandleByIndex": driver.by_index,
        "nvmlDeviceGetHandleByUUID": lambda uuid: driver.by_index(int(uuid[-1])),
        "nvmlDeviceGetName": lambda gpu: gpu.name,
        "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(total=gpu.memory_bytes),
        "nvmlDeviceGetCudaComputeCapability": lambda gpu: gpu.capability,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    return driver


@pytest.fixture
def gpu_tools(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine with a toolkit and compilers in the folders `cuda` and `bin` of `tmp_path`."""
    write_program(tmp_path / "cuda" / "bin" / "nvcc", 'echo "Cuda compilation tools, release 13.0, V13.0.88"')
    for name in ("cc", "c++"):
        write_program(tmp_path / "bin" / name, "true")
    return {"CUDA_HOME": str(tmp_path / "cuda"), "PATH": str(tmp_path / "bin")}


def write_program(file: Path, script: str) -> None:
    """Write a shell script that can be run."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)

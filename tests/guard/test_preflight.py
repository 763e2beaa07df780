"""What the engine needs of a machine with a GPU: each fact broken in turn, and how the facts are read."""

import os
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Final

import pynvml
import pytest

from services.core.errors import ConfigurationError
from services.guard import preflight
from services.guard.checkpoints import resolve_checkpoint
from services.guard.gpu_memory import GIB
from services.guard.preflight import CHECKS, Gpu, GpuMachine, check_memory, read_machine, require_gpu_machine
from tests.support.nvidia import Driver, write_program

L40S: Final = Gpu("NVIDIA L40S", int(44.7 * GIB), (8, 9))
GOOD: Final = GpuMachine(
    gpus=(L40S,),
    driver="580.95.05",
    nvcc="/usr/local/cuda/bin/nvcc",
    cuda_release="13.0",
    c_compiler="/usr/bin/cc",
    cpp_compiler="/usr/bin/c++",
    python_header="/usr/include/python3.11/Python.h",
)
BROKEN: Final = {
    "old driver": (
        "driver",
        replace(GOOD, driver="570.172.08", is_usable_by_pytorch=False),
        "570.172.08 is too old for CUDA 13",
    ),
    "T4": ("capability", replace(GOOD, gpus=(Gpu("Tesla T4", 15 * GIB, (7, 5)),)), "Tesla T4 has the compute"),
    "no toolkit": ("toolkit", replace(GOOD, nvcc=""), "nvcc is not installed"),
    "broken nvcc": ("toolkit", replace(GOOD, cuda_release=""), "/usr/local/cuda/bin/nvcc does not run"),
    "CUDA 12": ("toolkit", replace(GOOD, cuda_release="12.9"), "of CUDA 12.9, and the engine needs CUDA 13"),
    "no compiler": (
        "compiler",
        replace(GOOD, c_compiler="", cpp_compiler=""),
        "a C and a C++ compiler is not installed",
    ),
    "only gcc": ("compiler", replace(GOOD, cpp_compiler=""), "a C++ compiler is not installed"),
    "no headers": ("python headers", replace(GOOD, python_header=""), "Python.h of Python"),
}


def test_good_machine_passes_every_check() -> None:
    assert [name for name, check in CHECKS.items() if not check(GOOD).is_ok] == []
    require_gpu_machine(GOOD)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_fact_fails_its_check_alone_and_stops_the_engine(name: str) -> None:
    broken, machine, words = BROKEN[name]

    findings = {check: function(machine) for check, function in CHECKS.items()}

    assert [check for check, finding in findings.items() if not finding.is_ok] == [broken]
    assert words in findings[broken].detail
    with pytest.raises(ConfigurationError) as raised:
        require_gpu_machine(machine)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_several_causes_are_named_together() -> None:
    with pytest.raises(ConfigurationError, match=r"nvcc is not installed.*install g\+\+.*Python\.h"):
        require_gpu_machine(replace(GOOD, nvcc="", cpp_compiler="", python_header=""))


def test_machine_without_a_gpu_needs_none_of_it() -> None:
    require_gpu_machine(GpuMachine())


def test_old_driver_that_pytorch_can_use_passes() -> None:
    """NVIDIA's package cuda-compat lets data-centre GPUs run CUDA 13 on an older driver."""
    assert CHECKS["driver"](replace(GOOD, driver="570.172.08", is_usable_by_pytorch=True)).is_ok


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_gpus_from_ampere_on_pass(capability: tuple[int, int]) -> None:
    assert CHECKS["capability"](replace(GOOD, gpus=(replace(L40S, capability=capability),))).is_ok


class TestMemory:
    MODEL = resolve_checkpoint("LlavaGuard-v1.2-7B-OV")
    L4 = Gpu("NVIDIA L4", int(22.5 * GIB), (8, 9))

    def test_gpu_that_holds_the_checkpoint_passes(self) -> None:
        assert check_memory(GOOD, self.MODEL, None).is_ok

    def test_small_gpu_is_named_with_the_need_and_the_remedy(self) -> None:
        finding = check_memory(replace(GOOD, gpus=(self.L4,)), self.MODEL, None)

        assert not finding.is_ok
        assert f"needs {self.MODEL.gpu_memory_bytes / GIB:.0f} GiB" in finding.detail
        assert "choose a smaller checkpoint" in finding.detail

    def test_second_gpu_of_the_machine_counts_only_if_a_guard_gets_it(self) -> None:
        machine = replace(GOOD, gpus=(self.L4, self.L4))

        one, two = check_memory(machine, self.MODEL, None), check_memory(machine, self.MODEL, 2)

        assert not one.is_ok
        assert "set SLUICE_GUARD_GPUS=2" in one.detail
        assert two.is_ok

    def test_gpu_that_a_guard_leaves_idle_is_named(self) -> None:
        finding = check_memory(replace(GOOD, gpus=(L40S, L40S)), self.MODEL, 2)

        assert finding.is_ok
        assert "leaves 1 of its 2 GPUs idle" in finding.detail

    def test_share_of_a_gpu_counts_as_its_share_of_the_memory(self) -> None:
        assert not check_memory(GOOD, self.MODEL, 0.5).is_ok


class TestReading:
    def test_facts_of_a_complete_machine_pass(
        self, nvidia_driver: Driver, gpu_tools: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(preflight, "find_python_header", lambda: "/usr/include/python3.11/Python.h")

        machine = read_machine(gpu_tools)

        assert list(machine.gpus) == nvidia_driver.gpus
        assert (machine.driver, machine.cuda_release) == ("580.95.05", "13.0")
        require_gpu_machine(machine)

    def test_only_gpus_that_are_visible_count(self, nvidia_driver: Driver, gpu_tools: dict[str, str]) -> None:
        other = Gpu("NVIDIA H100", 80 * GIB, (9, 0))
        nvidia_driver.gpus.append(other)

        assert read_machine({**gpu_tools, "CUDA_VISIBLE_DEVICES": "1"}).gpus == (other,)
        assert read_machine({**gpu_tools, "CUDA_VISIBLE_DEVICES": ""}).gpus == ()

    def test_part_of_a_gpu_has_the_capability_of_the_whole(
        self, nvidia_driver: Driver, gpu_tools: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = nvidia_driver.gpus[0]
        part = Gpu("NVIDIA L40S MIG 1g", 10 * GIB, (0, 0))
        nvidia_driver.gpus.append(part)

        def get_capability(gpu: Gpu) -> tuple[int, int]:
            if gpu is part:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
            return gpu.capability

        monkeypatch.setattr(pynvml, "nvmlDeviceGetCudaComputeCapability", get_capability)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetDeviceHandleFromMigDeviceHandle", lambda _: whole)

        (found,) = read_machine({**gpu_tools, "CUDA_VISIBLE_DEVICES": "MIG-1"}).gpus

        assert (found.name, found.memory_bytes, found.capability) == (part.name, part.memory_bytes, whole.capability)

    @pytest.mark.usefixtures("nvidia_driver")
    def test_machine_without_tools_lacks_each(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(preflight, "find_python_header", lambda: "")

        machine = read_machine({"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path)})

        assert [name for name, check in CHECKS.items() if not check(machine).is_ok] == [
            "toolkit",
            "compiler",
            "python headers",
        ]

    @pytest.mark.parametrize("usable", [True, False])
    def test_pytorch_is_asked_about_an_old_driver(
        self, nvidia_driver: Driver, gpu_tools: dict[str, str], usable: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        nvidia_driver.version = "535.261.03"
        monkeypatch.setattr(preflight, "is_cuda_available", lambda: usable)

        assert CHECKS["driver"](read_machine(gpu_tools)).is_ok is usable

    def test_nvcc_of_cuda_home_is_preferred_to_that_of_path(self, gpu_tools: dict[str, str], tmp_path: Path) -> None:
        write_program(tmp_path / "bin" / "nvcc", 'echo "release 12.4, V12.4.99"')

        assert preflight.find_nvcc(gpu_tools) == str(tmp_path / "cuda" / "bin" / "nvcc")
        without = {name: value for name, value in gpu_tools.items() if name != "CUDA_HOME"}
        assert preflight.read_cuda_release(preflight.find_nvcc(without)) == "12.4"

    def test_nvcc_in_its_usual_folder_is_found_without_variables(self, tmp_path: Path) -> None:
        write_program(tmp_path / "cuda" / "bin" / "nvcc", "exit 1")

        found = preflight.find_nvcc({"PATH": os.defpath}, tmp_path / "cuda")

        assert found == str(tmp_path / "cuda" / "bin" / "nvcc")
        assert preflight.read_cuda_release(found) == ""

    def test_python_header_is_that_of_the_running_python(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
        assert preflight.find_python_header() == ""
        (tmp_path / "Python.h").touch()
        assert preflight.find_python_header() == str(tmp_path / "Python.h")

    @pytest.mark.parametrize("has_gpu", [True, False])
    def test_driver_that_does_not_answer_is_a_problem_only_of_a_machine_with_a_gpu(
        self, nvidia_driver: Driver, has_gpu: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After an upgrade of the driver without a restart, NVML refuses to start."""
        nvidia_driver.error = pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH
        monkeypatch.setattr(preflight, "has_nvidia_gpu", lambda: has_gpu)

        machine = read_machine({})

        assert machine == GpuMachine(driver_problem=machine.driver_problem)
        assert ("version mismatch" in machine.driver_problem) is has_gpu
        assert read_machine({"CUDA_VISIBLE_DEVICES": ""}) == GpuMachine()  # hidden on purpose

    def test_gpu_without_a_driver_is_found_on_the_pci_bus(self, tmp_path: Path) -> None:
        def add(device: str, vendor: str, kind: str) -> None:
            (tmp_path / device).mkdir()
            (tmp_path / device / "vendor").write_text(f"{vendor}\n")
            (tmp_path / device / "class").write_text(f"{kind}\n")

        assert not preflight.has_nvidia_gpu(tmp_path / "absent")
        add("0000:00:02.0", "0x8086", "0x030000")  # a display controller of another vendor
        add("0000:01:00.1", "0x10de", "0x040300")  # NVIDIA's sound
        (tmp_path / "0000:02:00.0").mkdir()
        assert not preflight.has_nvidia_gpu(tmp_path)
        add("0000:01:00.0", "0x10de", "0x030200")
        assert preflight.has_nvidia_gpu(tmp_path)

from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest

from services.core.errors import ConfigurationError
from services.guard import gpus
from services.guard.checkpoints import Checkpoint, resolve_checkpoint
from services.guard.gpu_memory import GIB
from services.guard.gpus import plan_gpus, read_gpu_memory_bytes
from services.guard.preflight import Gpu
from tests.support.nvidia import Driver


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    def with_gpus(*gib: float, usable: bool = True) -> None:
        monkeypatch.setattr(gpus, "read_gpu_memory_bytes", lambda: [int(each * GIB) for each in gib])
        monkeypatch.setattr(gpus, "is_cuda_available", lambda: usable)

    return with_gpus


def count_gpus(checkpoint: Checkpoint, requested: float | None = None) -> int:
    """The GPUs on which the checkpoint runs; 0: on the CPU."""
    plan = plan_gpus(checkpoint, requested)
    return plan.gpus if plan else 0


class TestDevice:
    def test_checkpoint_that_fits_gets_as_few_gpus_as_hold_it(self, machine) -> None:
        machine(79.3)
        assert count_gpus(resolve_checkpoint("LlavaGuard-v1.2-7B-OV")) == 1
        machine(79.3, 79.3, 79.3)
        assert count_gpus(resolve_checkpoint("LlavaGuard-34B")) == 2

    def test_too_little_gpu_memory_is_rejected(self, machine) -> None:
        machine(22.5)
        with pytest.raises(ConfigurationError, match=r"needs 38 GiB of GPU memory.* has 22 GiB: .*SLUICE_GUARD_GPUS"):
            count_gpus(resolve_checkpoint("LlavaGuard-v1.1-13B"))

    def test_checkpoint_that_cannot_be_divided_is_rejected(self, machine) -> None:
        """Two GPUs of half the memory do not do: each holds the vision tower and the working space whole."""
        machine(11, 11)
        with pytest.raises(ConfigurationError, match=r"needs 22 GiB .*more if it is divided.* has 11 \+ 11 GiB"):
            plan_gpus(resolve_checkpoint("LlavaGuard-v1.1-7B"))

    def test_share_of_a_gpu_limits_the_checkpoint(self, machine) -> None:
        machine(44.5)
        assert count_gpus(resolve_checkpoint("LlavaGuard-v1.2-0.5B-OV"), 0.5) == 1
        with pytest.raises(ConfigurationError, match=r"this replica has 9 GiB"):
            count_gpus(resolve_checkpoint("LlavaGuard-v1.2-0.5B-OV"), 0.2)

    def test_small_model_without_gpu_runs_on_the_cpu(self, machine) -> None:
        machine()
        assert count_gpus(resolve_checkpoint("tiny")) == 0
        assert count_gpus(resolve_checkpoint("LlavaGuard-v1.2-0.5B-OV")) == 0

    def test_large_model_without_gpu_is_rejected(self, machine) -> None:
        machine()
        with pytest.raises(
            ConfigurationError, match=r"8\.0 billion parameters, too many for a CPU, and there is no GPU"
        ):
            count_gpus(resolve_checkpoint("LlavaGuard-v1.2-7B-OV"))

    def test_parameters_in_the_folder_decide_about_the_cpu(self, machine, monkeypatch: pytest.MonkeyPatch) -> None:
        machine()
        monkeypatch.setattr(gpus, "_CPU_PARAMETERS_LIMIT", 1000)
        with pytest.raises(ConfigurationError, match=r"tiny has 0\.0 billion parameters"):
            count_gpus(resolve_checkpoint("tiny"))

    @pytest.mark.parametrize("model", ["tiny", "LlavaGuard-v1.2-0.5B-OV", "LlavaGuard-v1.2-7B-OV"])
    def test_gpu_that_pytorch_cannot_use_is_an_error(self, machine, model: str) -> None:
        """With an old driver a small model would judge on the CPU of a machine that is paid for its GPU."""
        machine(79.3, usable=False)
        for requested in (None, 1.0):
            with pytest.raises(
                ConfigurationError, match=r"PyTorch cannot use .*update its driver.*SLUICE_GUARD_GPUS=0"
            ):
                plan_gpus(resolve_checkpoint(model), requested=requested)

    def test_replica_without_gpus_ignores_those_of_the_machine(self, machine) -> None:
        for usable in (False, True):
            machine(79.3, usable=usable)
            assert plan_gpus(resolve_checkpoint("tiny"), requested=0) is None
            with pytest.raises(ConfigurationError, match="too many for a CPU, and SLUICE_GUARD_GPUS is 0"):
                plan_gpus(resolve_checkpoint("LlavaGuard-v1.2-7B-OV"), requested=0)

    def test_missing_gpu_is_an_error_if_the_settings_request_one(self, machine) -> None:
        machine()
        with pytest.raises(ConfigurationError, match=r"SLUICE_GUARD_GPUS is 0\.5, and this replica sees no GPU"):
            plan_gpus(resolve_checkpoint("tiny"), requested=0.5)

    def test_idle_gpus_of_a_replica_are_told(self, machine, caplog: pytest.LogCaptureFixture) -> None:
        machine(79.3, 79.3)
        plan_gpus(resolve_checkpoint("LlavaGuard-34B"), requested=2)
        plan_gpus(resolve_checkpoint("LlavaGuard-v1.2-7B-OV"))
        assert not caplog.records
        plan_gpus(resolve_checkpoint("LlavaGuard-v1.2-7B-OV"), requested=2)
        assert "needs 1 of the 2 GPUs of this replica" in caplog.text
        assert "set SLUICE_GUARD_GPUS=1" in caplog.text


class TestVisibleGpus:
    @pytest.fixture(autouse=True)
    def _three_gpus(self, nvidia_driver: Driver) -> None:
        nvidia_driver.gpus = [Gpu(f"NVIDIA L{index}", index * 10, (8, 9)) for index in range(3)]

    @pytest.mark.parametrize(
        ("visible", "memory"),
        [(None, [0, 10, 20]), ("2,0", [20, 0]), ("", []), ("GPU-1", [10]), ("1,9,2", [10]), ("-1", []), ("none", [])],
    )
    def test_visible_gpus_are_those_of_cuda_visible_devices(
        self, monkeypatch: pytest.MonkeyPatch, visible: str | None, memory
    ) -> None:
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert read_gpu_memory_bytes() == memory


def test_gpu_whose_memory_cannot_be_read_is_not_used(
    nvidia_driver: Driver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def get_memory(gpu: Gpu) -> SimpleNamespace:
        if gpu.memory_bytes:
            return SimpleNamespace(total=gpu.memory_bytes)
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", get_memory)
    nvidia_driver.gpus = [Gpu("NVIDIA L40S", GIB, (8, 9)), Gpu("NVIDIA GB10", 0, (12, 1))]

    assert read_gpu_memory_bytes() == [GIB]
    assert "the memory of a GPU cannot be read (Not Supported)" in caplog.text


def test_machine_without_driver_has_no_gpu(nvidia_driver: Driver) -> None:
    nvidia_driver.error = pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
    assert read_gpu_memory_bytes() == []


def test_import_does_not_load_pytorch() -> None:
    source = Path(gpus.__file__).read_text(encoding="utf-8")
    assert "\nimport torch" not in source

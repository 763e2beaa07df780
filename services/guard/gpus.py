"""Chooses the GPUs of a checkpoint before any download or start, and without loading PyTorch in this process."""

import functools
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Final

import pynvml  # nvidia-ml-py, which SGLang brings along

from services.core.errors import ConfigurationError
from services.guard.checkpoints import Checkpoint
from services.guard.gpu_memory import GIB, MemoryPlan
from services.guard.safetensors import count_parameters

logger = logging.getLogger(__name__)

_CPU_PARAMETERS_LIMIT: Final = 2_000_000_000
"""A larger model needs minutes for one image on a CPU, and more memory than most machines have."""


def plan_gpus(
    checkpoint: Checkpoint, requested: float | None = None, in_flight: int | None = None
) -> MemoryPlan | None:
    """How a replica uses the GPUs of this process; None: it runs on the CPU. Blocks.

    Args:
        checkpoint: what the replica loads.
        requested: the GPUs of a replica; below 1: the share of one GPU's memory that it may use; 0: it uses only the
            CPU; None: those that there are.
        in_flight: calls at a time; None: as many as the GPU needs and holds.

    Raises:
        ConfigurationError: the GPUs have too little memory, PyTorch cannot use them, or there is none although it was
            requested, or although the model is too large for the CPU.
    """
    memory = read_gpu_memory_bytes() if requested != 0 else []
    if requested and not memory:
        raise ConfigurationError(
            f"SLUICE_GUARD_GPUS is {requested:g}, and this replica sees no GPU: check that `nvidia-smi` lists one, "
            "or set SLUICE_GUARD_GPUS=0 to judge on the CPU."
        )
    if memory and not is_cuda_available():
        raise ConfigurationError(
            "PyTorch cannot use this machine's GPU: update its driver (`nvidia-smi` shows the version), or set "
            "SLUICE_GUARD_GPUS=0 to judge on the CPU."
        )
    if memory:
        share = min(1.0, requested or 1.0)
        mine = [int(each * share) for each in memory]
        if plan := checkpoint.plan_memory(mine, in_flight):
            if requested and plan.gpus < requested:
                logger.warning(
                    "%s needs %d of the %g GPUs of this replica, and the others are idle; set SLUICE_GUARD_GPUS=%d, "
                    "and SLUICE_GUARD_REPLICAS to the number of GPUs",
                    checkpoint.name,
                    plan.gpus,
                    requested,
                    plan.gpus,
                )
            return plan
        have = " + ".join(f"{each / GIB:.0f}" for each in mine)
        raise ConfigurationError(
            f"{describe_need(checkpoint)}, and this replica has {have} GiB: give it more GPUs (SLUICE_GUARD_GPUS) or "
            "choose a smaller checkpoint (SLUICE_MODEL)."
        )
    # A folder of .bin files has no headers: use the row's number.
    size = (checkpoint.folder and count_parameters(checkpoint.folder)) or checkpoint.parameters
    if size > _CPU_PARAMETERS_LIMIT:
        reason = "SLUICE_GUARD_GPUS is 0" if requested == 0 else "there is no GPU here"
        raise ConfigurationError(
            f"{checkpoint.name} has {size / 1e9:.1f} billion parameters, too many for a CPU, and {reason}: run it "
            "on a machine with a GPU (SLUICE_GUARD_GPUS) or choose a smaller checkpoint (SLUICE_MODEL)."
        )
    return None


def describe_need(checkpoint: Checkpoint) -> str:
    """The memory that a replica needs on its GPUs, as the first half of a sentence."""
    gib = f"{checkpoint.gpu_memory_bytes / GIB:.0f} GiB"
    return f"{checkpoint.name} needs {gib} of GPU memory (somewhat more if it is divided among several GPUs)"


def read_gpu_memory_bytes() -> list[int]:
    """The total memory of each NVIDIA GPU that CUDA_VISIBLE_DEVICES leaves visible, in its order."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []  # There is no driver, so there is no GPU.
    memory: list[int] = []
    try:
        for handle in find_visible_gpus(os.environ):
            memory.append(int(pynvml.nvmlDeviceGetMemoryInfo(handle).total))
    except pynvml.NVMLError as error:
        logger.warning("the memory of a GPU cannot be read (%s), so it and those after it are not used", error)
    finally:
        pynvml.nvmlShutdown()
    return memory


def find_visible_gpus(environment: Mapping[str, str]) -> Iterator[object]:
    """NVML's handles of the GPUs that CUDA_VISIBLE_DEVICES leaves visible, in its order. NVML must be initialized."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible is not None else map(str, range(pynvml.nvmlDeviceGetCount()))
    for name in names:
        try:
            handle = _find_handle(name.strip())
        except (pynvml.NVMLError, ValueError):
            return  # As in CUDA, the names after an unknown name are ignored.
        yield handle


@functools.cache
def is_cuda_available() -> bool:
    """Whether PyTorch can use a GPU. Runs in a child process, so that this process does not load PyTorch. Blocks."""
    question = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 3)"
    return subprocess.run([sys.executable, "-P", "-c", question], check=False, stdin=subprocess.DEVNULL).returncode == 0


def _find_handle(name: str) -> object:
    if name.startswith(("GPU-", "MIG-")):
        return pynvml.nvmlDeviceGetHandleByUUID(name)
    return pynvml.nvmlDeviceGetHandleByIndex(int(name))

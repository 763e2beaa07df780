"""What a checkpoint runs on, decided before anything is downloaded or started, and without loading PyTorch here."""

import functools
import os
import subprocess
import sys
from typing import Final

import pynvml  # nvidia-ml-py, which SGLang brings along

from services.core.errors import ConfigurationError
from services.guard.checkpoints import GIB, Checkpoint
from services.guard.safetensors import count_parameters

_STATIC_SHARE: Final = 0.80
"""Of a GPU's memory for weights and KV cache; the rest is for activations and images on their way."""
_STATIC_SHARE_LIMIT: Final = 0.90

_CPU_PARAMETERS_LIMIT: Final = 2_000_000_000
"""A larger model takes minutes for one image on a CPU, and more memory than most machines have."""


def choose_gpu_count(checkpoint: Checkpoint, share: float = 1.0) -> int:
    """How many GPUs the checkpoint is spread over; 0 where it runs on the CPU. Blocks.

    `share`: of a GPU's memory that this replica may have.

    Raises:
        ConfigurationError: the GPUs hold too little of it, or there is none and it is too large for the CPU.
    """
    memory = read_gpu_memory_bytes()
    if memory and is_cuda_available():
        mine = [int(each * share) for each in memory]
        if gpus := checkpoint.tensor_parallel_size(mine):
            return gpus
        have = " + ".join(f"{each / GIB:.0f}" for each in mine)
        raise ConfigurationError(
            f"{checkpoint.name} wants {checkpoint.gpu_memory_bytes / GIB:.0f} GiB of GPU memory and this replica has "
            f"{have} GiB: give it more GPUs (SLUICE_GUARD_GPUS) or choose a smaller checkpoint (SLUICE_MODEL)."
        )
    # A folder of the older .bin files does not say; then it is taken for what its row is.
    size = (checkpoint.folder and count_parameters(checkpoint.folder)) or checkpoint.parameters
    if size > _CPU_PARAMETERS_LIMIT:
        trouble = "PyTorch cannot use this machine's GPU (is its driver too old?)" if memory else "there is no GPU here"
        raise ConfigurationError(
            f"{checkpoint.name} has {size / 1e9:.1f} billion parameters, too many for a CPU, and {trouble}: run it "
            "where there is one (SLUICE_GUARD_GPUS) or choose a smaller checkpoint (SLUICE_MODEL)."
        )
    return 0


def read_gpu_memory_bytes() -> list[int]:
    """The total memory of each NVIDIA GPU that CUDA_VISIBLE_DEVICES leaves visible, in its order."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []  # No driver, so no GPU.
    try:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible is not None else map(str, range(pynvml.nvmlDeviceGetCount()))
        memory: list[int] = []
        for name in names:
            try:
                memory.append(int(pynvml.nvmlDeviceGetMemoryInfo(_handle(name.strip())).total))
            except (pynvml.NVMLError, ValueError):
                break  # As CUDA does: what follows a name that it does not know is invisible.
        return memory
    finally:
        pynvml.nvmlShutdown()


def compute_mem_fraction_static(share: float = 1.0) -> float:
    """SGLang's `--mem-fraction-static` for a replica with this share of a GPU.

    SGLang means a part of what is free when it starts, which is less than all where another replica came first.
    """
    if share >= 1:
        return _STATIC_SHARE
    total = free = 0
    try:
        pynvml.nvmlInit()
        memory = pynvml.nvmlDeviceGetMemoryInfo(_handle(os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]))
        total, free = int(memory.total), int(memory.free)
        pynvml.nvmlShutdown()
    except (pynvml.NVMLError, ValueError):
        return _STATIC_SHARE * share
    return min(_STATIC_SHARE_LIMIT, _STATIC_SHARE * share * total / max(free, 1))


@functools.cache
def is_cuda_available() -> bool:
    """Whether PyTorch can use a GPU: asked of a process of its own, so that this one need not load PyTorch. Blocks."""
    question = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 3)"
    return subprocess.run([sys.executable, "-c", question], check=False, stdin=subprocess.DEVNULL).returncode == 0


def _handle(name: str) -> object:
    if name.startswith(("GPU-", "MIG-")):
        return pynvml.nvmlDeviceGetHandleByUUID(name)
    return pynvml.nvmlDeviceGetHandleByIndex(int(name))

"""SGLang on a machine without CUDA, through SGLang's own extension point.

SGLang loads this module by the entry point `sluice_cpu` of the group `sglang.srt.platforms`, in each of its
processes, after it has imported torch and its own CPU platform itself. So nothing here costs a CUDA machine anything.
"""

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


def activate() -> str | None:
    """The platform class to use instead of SGLang's choice, or None where CUDA is available."""
    if torch.cuda.is_available():
        return None
    return f"{__name__}:CpuPlatform"


class CpuPlatform(CpuDeviceMixin, SRTPlatform):  # type: ignore[misc]  # SGLang has no type information
    """Plain PyTorch on the CPU.

    SGLang's own CPU engine (SGLANG_USE_CPU_ENGINE) wants kernels that its PyPI wheels lack; out of tree, SGLang
    takes its torch-native code paths, which need none.
    """

    _enum = PlatformEnum.OOT

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

"""SGLang on a machine without CUDA, through SGLang's own extension point.

SGLang loads this module by the entry point `sluice_cpu` of the group `sglang.srt.platforms`, in each of its
processes, after it has imported torch and its own CPU platform. So a CUDA machine imports nothing more.
"""

from functools import partial

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

    SGLang's own CPU engine (SGLANG_USE_CPU_ENGINE) needs kernels that its PyPI wheels do not contain. For a platform
    out of its tree SGLang uses its torch-native code, which needs none.
    """

    _enum = PlatformEnum.OOT

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    def post_load_model(self, model: torch.nn.Module) -> None:
        """Let the linear layers compute in single precision. Their inputs and outputs keep their type.

        SGLang loads a LLaVA in half precision, for which most CPUs have no instructions: 159 x 128 times 128 x 640 took
        2770 microseconds in float16, 849 in bfloat16 and 154 in float32 on one core of a Xeon with AVX-512.
        """
        from sglang.srt.layers.linear import LinearBase  # noqa: PLC0415 - heavy, and only the worker needs it

        for module in model.modules():
            weight = getattr(module, "weight", None)
            if not isinstance(weight, torch.Tensor) or weight.dtype not in (torch.float16, torch.bfloat16):
                continue
            if isinstance(module, torch.nn.Linear):
                module.forward = partial(_linear, module.weight.detach().float(), bias=module.bias)
            elif isinstance(module, LinearBase):
                module.quant_method.apply = partial(_apply, module.weight.detach().float())


def _linear(weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As `torch.nn.functional.linear`, with a weight in float32."""
    return torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def _apply(
    weight: torch.Tensor, _layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """In place of SGLang's `UnquantizedLinearMethod.apply`."""
    return _linear(weight, x, bias)

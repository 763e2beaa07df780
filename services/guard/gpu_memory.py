"""Divides a GPU's memory: weights, KV cache, and working space for images and prompts. Pure.

SGLang would give the KV cache a fixed share of the GPU, far more than the calls in flight can use, and leave too little
working space for large images on small GPUs. All figures are calculated from the published configurations; none was
measured on a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

GIB: Final = 1 << 30
_HALF: Final = 2
"""Bytes of a number in half precision."""
_CONTEXT_BYTES: Final = 3 * GIB // 2
"""CUDA's context, the libraries' workspaces and the decode graphs."""
_USABLE_SHARE: Final = 0.97
"""The driver reserves the rest."""
_WORKING_SPACE_MARGIN: Final = 1.2
_PREFILL_SIZES: Final = (32768, 16384, 8192)
"""Tokens of a prefill batch, best first: a boundary inside an image encodes the whole image again."""
_TEXT_TOKENS: Final = 2048
"""A policy of nearly twice the default's length, and the answer."""
_SPARE_PROMPTS: Final = 4
"""Prompts in the KV cache beyond those in flight: for probes, and for images that further policies find there."""
_ENOUGH_IN_FLIGHT: Final = 8
"""A long prefill batch is worth more than further calls at a time."""
_MIN_IN_FLIGHT: Final = 4
"""With fewer calls at a time a GPU is mostly idle."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The sizes of a checkpoint that decide about its memory."""

    parameters: int
    """The approximate number, with the vision tower."""
    layers: int
    hidden_size: int
    intermediate_size: int
    kv_heads: int
    head_dim: int
    image_tokens: int
    """The most tokens of an image."""
    tiles: int
    """The most views of an image that the vision tower encodes."""
    tile_bytes: int
    """Working space of the vision tower for a view. SGLang's LLaVA keeps the outputs of all layers."""
    tower_parameters: int = 430_000_000
    """Of the vision tower, which each of several GPUs holds whole."""

    @property
    def prompt_tokens(self) -> int:
        """The most tokens of a call: image, policy and answer."""
        return self.image_tokens + _TEXT_TOKENS

    def weights_bytes(self, gpus: int) -> int:
        """On each of the GPUs."""
        return _HALF * (self.tower_parameters + (self.parameters - self.tower_parameters) // gpus)

    def kv_bytes(self, gpus: int) -> int:
        """Of one token, on each of the GPUs."""
        return 2 * _HALF * self.layers * max(1, self.kv_heads // gpus) * self.head_dim

    def working_bytes(self, prefill_tokens: int, in_flight: int, gpus: int) -> int:
        """For a prefill batch of this many tokens, on each of the GPUs."""
        # A batch may begin and end inside an image.
        images = min(in_flight, prefill_tokens // self.image_tokens + 2)
        vision = images * self.tiles * self.tile_bytes
        language = prefill_tokens * _HALF * (3 * self.intermediate_size // gpus + 8 * self.hidden_size)
        return round(_WORKING_SPACE_MARGIN * max(vision, language))


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How a replica uses its GPUs."""

    gpus: int
    in_flight: int
    """Calls at a time."""
    prefill_tokens: int
    """The most tokens of a prefill batch."""
    kv_tokens: int
    """Tokens that the KV cache holds."""


def plan_memory(
    size: ModelSize, gpu_memory_bytes: Sequence[int], *, in_flight: int, at_least: int | None = None
) -> MemoryPlan | None:
    """The plan for a replica on all of these GPUs (the memory of each that it may use); None: they cannot hold it.

    The prefill batch becomes smaller before fewer than eight calls run at a time, or than `in_flight` if this is less.
    A replica with fewer than four calls at a time, or than `at_least`, is not planned.
    """
    gpus = len(gpu_memory_bytes)
    least = _MIN_IN_FLIGHT if at_least is None else at_least
    room = int(_USABLE_SHARE * min(gpu_memory_bytes)) - _CONTEXT_BYTES - size.weights_bytes(gpus)
    plan: MemoryPlan | None = None
    for prefill_tokens in _PREFILL_SIZES:
        kv_room = room - size.working_bytes(prefill_tokens, in_flight, gpus)
        tokens = max(0, kv_room) // size.kv_bytes(gpus)
        prompts = tokens // size.prompt_tokens
        if prompts >= least and (plan is None or prompts > plan.in_flight):
            calls = min(in_flight, prompts)
            plan = MemoryPlan(gpus, calls, prefill_tokens, min(tokens, (calls + _SPARE_PROMPTS) * size.prompt_tokens))
        if plan is not None and plan.in_flight >= min(in_flight, _ENOUGH_IN_FLIGHT):
            break
    return plan

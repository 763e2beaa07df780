"""The division of a GPU's memory. The GPUs are pretended: their memory is as the driver reports it, in GiB."""

import math

import pytest
from sglang.srt.multimodal.mm_utils import get_anyres_image_grid_shape, unpad_image_shape

from services.core.settings import Settings
from services.guard.checkpoints import CHECKPOINTS, Checkpoint, assume_in_flight, resolve_checkpoint
from services.guard.gpu_memory import GIB, MemoryPlan

CARDS = {"l4": 22.5, "a100-40": 39.6, "l40s": 44.5, "h100": 79.3, "h200": 139.8}
OV_05B, OV_7B = "LlavaGuard-v1.2-0.5B-OV", "LlavaGuard-v1.2-7B-OV"


def plan(name: str, *cards: str, share: float = 1.0, in_flight: int | None = None) -> MemoryPlan:
    found = resolve_checkpoint(name).plan_memory([int(CARDS[card] * share * GIB) for card in cards], in_flight)
    assert found is not None
    return found


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("row", CHECKPOINTS, ids=lambda row: row.name)
def test_weights_cache_and_large_images_fit_together(row: Checkpoint, card: str) -> None:
    """A flat share of the GPU for weights and cache left too little room: four large images ended a 7B model."""
    memory = int(CARDS[card] * GIB)
    found = row.plan_memory([memory] * 8)
    if found is None:
        return
    size = row.size
    used = (
        size.weights_bytes(found.gpus)
        + found.kv_tokens * size.kv_bytes(found.gpus)
        + size.working_bytes(found.prefill_tokens, found.in_flight, found.gpus)
    )
    assert used < memory - GIB
    assert found.kv_tokens >= found.in_flight * size.prompt_tokens
    assert found.kv_tokens <= (found.in_flight + 4) * size.prompt_tokens
    assert found.in_flight >= 4


@pytest.mark.parametrize("row", CHECKPOINTS, ids=lambda row: row.name)
def test_least_memory_of_the_row_holds_a_replica(row: Checkpoint) -> None:
    """Otherwise the error would say that a GPU with enough memory has too little."""
    assert row.plan_memory([row.gpu_memory_bytes]) is not None
    assert row.plan_memory([row.gpu_memory_bytes - GIB]) is None


@pytest.mark.parametrize(
    ("name", "cards", "in_flight"),
    [
        (OV_05B, ["l4"], 16),
        (OV_05B, ["h100"], 48),
        (OV_05B, ["h200"], 48),
        (OV_7B, ["l4", "l4"], 12),
        (OV_7B, ["a100-40"], 12),
        (OV_7B, ["h200"], 16),
        # Each token of the cache takes 0.5 and 0.8 MB, so few calls fit.
        ("LlavaGuard-v1.1-7B", ["l4"], 4),
        ("LlavaGuard-v1.0-13B", ["a100-40"], 5),
        ("LlavaGuard-v1.0-13B", ["h100"], 16),
    ],
)
def test_calls_at_a_time_follow_checkpoint_and_gpu(name: str, cards: list[str], in_flight: int) -> None:
    assert plan(name, *cards).in_flight == in_flight


def test_prefill_is_smaller_on_a_smaller_gpu() -> None:
    assert plan(OV_7B, "h200").prefill_tokens == plan(OV_7B, "a100-40").prefill_tokens == 32768
    assert plan(OV_7B, "l4", "l4").prefill_tokens == plan(OV_05B, "l4", share=0.7).prefill_tokens == 16384
    assert plan("LlavaGuard-v1.1-7B", "l4").prefill_tokens == 8192


def test_working_space_is_that_of_the_images() -> None:
    """Four images of 2304 x 1728 px (31 tiles) need 5.4 GiB for the outputs of the tower and 2.6 GiB beside them."""
    size = resolve_checkpoint(OV_7B).size
    assert size.working_bytes(32768, 16, 1) > 8 * GIB
    assert size.working_bytes(8192, 16, 1) < size.working_bytes(16384, 16, 1) < size.working_bytes(32768, 16, 1)
    assert size.working_bytes(32768, 1, 1) < size.working_bytes(32768, 16, 1)


def test_largest_image_has_the_most_tokens_of_the_grid() -> None:
    """Counted as SGLang counts them in `LlavaBaseForCausalLM.pad_input_ids`."""
    grid = [(384 * wide, 384 * high) for wide in range(1, 7) for high in range(1, 7)]

    def count(size: tuple[int, int]) -> int:
        wide, high = get_anyres_image_grid_shape(size, grid, 384)
        height, width = unpad_image_shape(27 * high, 27 * wide, size)
        if (times := math.sqrt(height * width / (9 * 27 * 27))) > 1.1:
            height, width = int(height // times), int(width // times)
        return 27 * 27 + height * (width + 1)

    sides = [*range(24, 2305, 48), 984, 1200, 2304]
    most = max(count((width, height)) for width in sides for height in sides)
    assert most == resolve_checkpoint(OV_7B).size.image_tokens == resolve_checkpoint(OV_05B).size.image_tokens
    assert count((1920, 1080)) == 7269, "as planned for in `sluice plan`"


def test_two_replicas_share_a_gpu() -> None:
    """Each plan is of its own share, so replicas that start at the same moment do not take each other's memory."""
    half = plan(OV_05B, "l40s", share=0.5)
    size = resolve_checkpoint(OV_05B).size
    used = size.weights_bytes(1) + half.kv_tokens * size.kv_bytes(1)
    used += size.working_bytes(half.prefill_tokens, half.in_flight, 1)
    assert 2 * (used + GIB) < CARDS["l40s"] * GIB


def test_number_of_the_operator_stands() -> None:
    assert plan(OV_05B, "h200", in_flight=8).in_flight == 8
    assert plan(OV_05B, "h200", in_flight=96).in_flight == 96
    crowded = plan("LlavaGuard-v1.1-7B", "l4", in_flight=32)
    assert crowded.in_flight == 32
    assert crowded.kv_tokens < 32 * resolve_checkpoint("LlavaGuard-v1.1-7B").size.prompt_tokens


@pytest.mark.parametrize(
    ("settings", "in_flight"),
    [
        ({"model": OV_05B}, 48),
        ({"model": OV_7B}, 16),
        ({"model": OV_05B, "guard_in_flight": 5}, 5),
        ({"model": "/only/on/the/guards/machine"}, 16),
    ],
)
def test_processes_without_the_gpu_assume_the_number_of_the_checkpoint(settings, in_flight: int) -> None:
    assert assume_in_flight(Settings(**settings)) == in_flight

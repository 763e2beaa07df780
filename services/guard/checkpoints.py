"""The checkpoints that Sluice knows. A new release is a new row of `CHECKPOINTS`.

Sources of the rows: LlavaGuard's repository (github.com/ml-research/LlavaGuard: its README, `llava-configs` and
`server/sglang.py`) for architectures, towers, tokenizers and layouts; the hub for names. Values without a source are
marked as unverified. GPU memory is calculated (see `services.guard.gpu_memory`) and a little below the memory of a card
of that class.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from services.core.errors import ConfigurationError
from services.core.settings import Settings
from services.guard.families.base import ModelFamily
from services.guard.families.llavaguard import LlavaGuard
from services.guard.families.llavaguard_format import ImageOrder
from services.guard.families.shieldgemma import ShieldGemma
from services.guard.gpu_memory import GIB, MemoryPlan, ModelSize, plan_memory
from services.guard.safetensors import read_json

_TENSOR_PARALLEL_SIZES: Final = (1, 2, 4, 8)
_LARGE_GPU_BYTES: Final = 70 * GIB
_ASSUMED_IN_FLIGHT: Final = 16
_ONEVISION_OF_TRANSFORMERS: Final = "LlavaOnevisionForConditionalGeneration"
_FLOAT16: Final = ("--dtype", "float16")
_BFLOAT16: Final = ("--dtype", "bfloat16")
_SIGLIP: Final = "google/siglip-so400m-patch14-384"
_SIGLIP_PREPROCESSOR: Final = {
    "image_processor_type": "SiglipImageProcessor",
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"height": 384, "width": 384},
}
_CLIP: Final = "openai/clip-vit-large-patch14-336"
_SIGLIP_TILE_BYTES: Final = 68 << 20
"""The outputs of 28 layers for 729 patches, and temporary values."""
_CLIP_TILE_BYTES: Final = 45 << 20
"""The outputs of 25 layers for 577 patches, and temporary values."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One row: the facts about a set of weights that are known without loading it."""

    name: str
    hub_id: str | None
    architecture: str
    family: ModelFamily
    """Builds its prompts and reads its answers."""
    max_side_px: int
    """The longest side of an image, in pixels, that the model can use."""
    gpu_memory_bytes: int
    """The memory that one replica needs on all its GPUs together: weights, KV cache and working space."""
    size: ModelSize
    in_flight: int = _ASSUMED_IN_FLIGHT
    """Calls at a time that keep a GPU busy. A GPU with less memory gets fewer."""
    large_gpu_in_flight: int = _ASSUMED_IN_FLIGHT
    """The same for a GPU with 70 GiB and more, which computes faster."""
    hidden_size: int | None = None
    """Distinguishes rows of one architecture when a local folder is given; None: the row for any other size."""
    vision_tower: str | None = None
    """The hub id of the vision tower, if the checkpoint does not contain one."""
    tokenizer: str | None = None
    """The hub id of the tokenizer and image processor, if the checkpoint does not contain them. A local folder may have
    them in its folder `tokenizer`."""
    launch_flags: tuple[str, ...] = _FLOAT16
    """float16, because SGLang always loads a LLaVA vision tower in it."""
    cuda_flags: tuple[str, ...] = ()
    """Further flags on a GPU."""
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Changes to the JSON files, by file name."""
    preprocessor: Mapping[str, Any] | None = None
    """Written as preprocessor_config.json instead of the checkpoint's own."""
    other_architectures: tuple[str, ...] = ()
    """Architectures of local folders that this row is for, too."""
    image_token_id: int | None = None
    """The id of the token `<image>` if the tokenizer's files do not name it."""
    tensor_prefix: str = ""
    """A prefix of the tensors' names that SGLang does not expect."""
    folder: Path | None = None
    """The folder of the weights, if they are on this machine."""

    @property
    def parameters(self) -> int:
        """The approximate number, with the vision tower."""
        return self.size.parameters

    @property
    def is_converted(self) -> bool:
        """Whether its tensors have transformers' names (its repository's name ends with `-hf`)."""
        return self.architecture == _ONEVISION_OF_TRANSFORMERS

    @property
    def is_llava(self) -> bool:
        """Whether SGLang loads it as a LLaVA, whose image token and vocabulary its config.json may misstate."""
        return self.architecture.startswith("Llava")

    def tensor_parallel_size(self, memory_bytes: Sequence[int]) -> int:
        """The smallest number of these GPUs (their memory in bytes) that holds a replica; 0 if they cannot hold one."""
        plan = self.plan_memory(memory_bytes)
        return plan.gpus if plan else 0

    def plan_memory(self, memory_bytes: Sequence[int], in_flight: int | None = None) -> MemoryPlan | None:
        """How a replica uses the smallest number of these GPUs that holds it; None if they cannot hold one.

        Args:
            memory_bytes: the memory of each GPU that the replica may use.
            in_flight: calls at a time; None: as many as the GPU needs and holds.
        """
        for count in _TENSOR_PARALLEL_SIZES:
            if count > len(memory_bytes) or count * min(memory_bytes) < self.gpu_memory_bytes:
                continue
            # The weakest counts, because SGLang divides everything evenly.
            weakest = min(memory_bytes)
            wanted = self.large_gpu_in_flight if weakest >= _LARGE_GPU_BYTES else self.in_flight
            if plan := plan_memory(self.size, [weakest] * count, in_flight=wanted):
                if in_flight is None:
                    return plan
                # The operator's number stands. If the memory is too small for it, calls wait inside the engine.
                chosen = plan_memory(self.size, [weakest] * count, in_flight=in_flight, at_least=1) or plan
                return replace(chosen, in_flight=in_flight)
        return None


def _llava_1_5(version: str, label: str) -> Checkpoint:
    """LLaVA-1.5 as a guard: one CLIP view of 336 px, the image padded to a square."""
    large = label == "13B"
    return Checkpoint(
        name=f"LlavaGuard-{version}-{label}",
        hub_id=f"AIML-TUDA/LlavaGuard-{version}-{label}",
        architecture="LlavaLlamaForCausalLM",
        family=LlavaGuard("vicuna_v1.1", wording="explain" if version == "v1.0" else "describe"),
        max_side_px=336,
        gpu_memory_bytes=(38 if large else 22) * GIB,
        size=ModelSize(
            parameters=13_400_000_000 if large else 7_100_000_000,
            layers=40 if large else 32,
            hidden_size=5120 if large else 4096,
            intermediate_size=13824 if large else 11008,
            kv_heads=40 if large else 32,
            head_dim=128,
            image_tokens=576,
            tiles=1,
            tile_bytes=_CLIP_TILE_BYTES,
        ),
        hidden_size=5120 if large else 4096,
        vision_tower=_CLIP,
        # The tokenizer in the checkpoint has no <image> token and no image processor.
        tokenizer=f"llava-hf/llava-1.5-{label.lower()}-hf",
        image_token_id=32000,
    )


def _onevision(label: str, **fields: Any) -> tuple[Checkpoint, Checkpoint]:
    """As LLaVA-NeXT's trainer saved it, and converted for transformers."""
    row = Checkpoint(
        name=f"LlavaGuard-v1.2-{label}-OV",
        hub_id=f"AIML-TUDA/LlavaGuard-v1.2-{label}-OV",
        architecture="LlavaQwenForCausalLM",
        family=LlavaGuard("chatml-llava"),
        # The longest side of its anyres grid: 6 tiles of 384 px.
        max_side_px=2304,
        vision_tower=_SIGLIP,
        preprocessor=_SIGLIP_PREPROCESSOR,
        image_token_id=151646,
        **fields,
    )
    converted = replace(
        row,
        name=f"{row.name}-hf",
        hub_id=f"{row.hub_id}-hf",
        architecture=_ONEVISION_OF_TRANSFORMERS,
        # It has its tower.
        vision_tower=None,
    )
    return row, converted


def _onevision_size(parameters: int, **fields: int) -> ModelSize:
    """Its anyres grid has 36 tiles, beside the whole image. The most tokens are those of an image of 984 x 1200 px."""
    return ModelSize(parameters, image_tokens=8765, tiles=37, tile_bytes=_SIGLIP_TILE_BYTES, **fields)


def _qwen_size(parameters: int, **fields: int) -> ModelSize:
    """Its tower sees an image of up to 1280 tokens as one, in 5120 patches."""
    return ModelSize(
        parameters,
        head_dim=128,
        image_tokens=1280,
        tiles=1,
        tile_bytes=320 << 20,
        tower_parameters=670_000_000,
        **fields,
    )


def _qwen(label: str, **fields: Any) -> Checkpoint:
    return Checkpoint(
        name=f"QwenGuard-v1.2-{label}",
        hub_id=f"AIML-TUDA/QwenGuard-v1.2-{label}",
        architecture="Qwen2_5_VLForConditionalGeneration",
        family=LlavaGuard("qwen2-vl"),
        # Unverified: the files of one of LlavaGuard's runs train a Qwen2-VL of this size.
        other_architectures=("Qwen2VLForConditionalGeneration",),
        max_side_px=1280,
        # LlavaGuard's evaluation uses at most 1280 patches of 28 x 28 px. Without the limit a square image of this side
        # would have 2116. The training used at most 262,144 px.
        launch_flags=(*_BFLOAT16, "--mm-process-config", json.dumps({"image": {"max_pixels": 1280 * 28 * 28}})),
        **fields,
    )


CHECKPOINTS: Final = (
    Checkpoint(
        name="tiny",
        hub_id=None,
        architecture="LlavaQwenForCausalLM",
        family=LlavaGuard("chatml-llava", wording="explain"),
        # Its tower sees 64 px, but it was trained with the engine's scaling of images up to this size.
        max_side_px=384,
        gpu_memory_bytes=3 * GIB,
        size=ModelSize(
            parameters=1_000_000,
            layers=4,
            hidden_size=128,
            intermediate_size=320,
            kv_heads=2,
            head_dim=32,
            image_tokens=64,
            tiles=1,
            tile_bytes=_SIGLIP_TILE_BYTES,
            tower_parameters=500_000,
        ),
        folder=Path(__file__).parent / "tiny",
    ),
    *_onevision(
        "0.5B",
        gpu_memory_bytes=12 * GIB,
        hidden_size=896,
        size=_onevision_size(900_000_000, layers=24, hidden_size=896, intermediate_size=4864, kv_heads=2, head_dim=64),
        # One call takes about 120 ms of which the GPU computes a fraction.
        large_gpu_in_flight=48,
    ),
    *_onevision(
        "7B",
        gpu_memory_bytes=38 * GIB,
        hidden_size=3584,
        size=_onevision_size(
            8_000_000_000, layers=28, hidden_size=3584, intermediate_size=18944, kv_heads=4, head_dim=128
        ),
    ),
    _qwen(
        "3B",
        gpu_memory_bytes=20 * GIB,
        hidden_size=2048,
        size=_qwen_size(3_800_000_000, layers=36, hidden_size=2048, intermediate_size=11008, kv_heads=2),
    ),
    _qwen(
        "7B",
        gpu_memory_bytes=22 * GIB,
        hidden_size=3584,
        size=_qwen_size(8_300_000_000, layers=28, hidden_size=3584, intermediate_size=18944, kv_heads=4),
    ),
    _llava_1_5("v1.0", "7B"),
    _llava_1_5("v1.0", "13B"),
    # Unverified: both names. LlavaGuard's repository only names `LlavaGuard-v1.1-7B-hf` and `-13B-hf`.
    _llava_1_5("v1.1", "7B"),
    _llava_1_5("v1.1", "13B"),
    Checkpoint(
        name="LlavaGuard-34B",
        hub_id="AIML-TUDA/LlavaGuard-34B",
        architecture="LlavaLlamaForCausalLM",
        # Unverified: it was trained with LLaVA's `chatml_direct`, which has "Answer the questions." in the system turn,
        # and is served with SGLang's `chatml-llava`. Its wording is that of v1.0, which was released at the same time.
        family=LlavaGuard("chatml-llava", wording="explain"),
        # Above 336 px its anyres grid makes 2928 tokens of an image. With the 1200 tokens of a policy these exceed the
        # 4096 positions of the model.
        max_side_px=336,
        gpu_memory_bytes=96 * GIB,
        size=ModelSize(
            parameters=34_800_000_000,
            layers=60,
            hidden_size=7168,
            intermediate_size=20480,
            kv_heads=8,
            head_dim=128,
            # The whole image and one tile, with the ends of its lines.
            image_tokens=1176,
            tiles=2,
            tile_bytes=_CLIP_TILE_BYTES,
        ),
        hidden_size=7168,
        vision_tower=_CLIP,
        tokenizer="liuhaotian/llava-v1.6-34b-tokenizer",
        # The tokenizer's files name this id, too. Some versions of transformers gave the token another one.
        image_token_id=64002,
    ),
    Checkpoint(
        name="ShieldGemma-2-4B",
        hub_id="google/shieldgemma-2-4b-it",
        architecture="ShieldGemma2ForImageClassification",
        family=ShieldGemma(),
        max_side_px=896,
        gpu_memory_bytes=20 * GIB,
        size=ModelSize(
            parameters=4_300_000_000,
            layers=34,
            hidden_size=2560,
            intermediate_size=10240,
            kv_heads=4,
            head_dim=256,
            image_tokens=256,
            tiles=1,
            # 4096 patches of 14 px.
            tile_bytes=200 << 20,
        ),
        # By default SGLang disables images for Gemma 3.
        launch_flags=(*_BFLOAT16, "--enable-multimodal"),
        # Only this backend lets the tokens of an image attend to each other, as in training. Its mask is wrong for a
        # prompt that is cut into chunks.
        cuda_flags=("--attention-backend", "triton", "--chunked-prefill-size", "-1"),
        # It is a Gemma 3 in a wrapper, and SGLang supports Gemma 3. The wrapper's processor would change the prompts.
        overrides={
            "config.json": {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"},
            "processor_config.json": {"processor_class": "Gemma3Processor"},
        },
        tensor_prefix="model.",
    ),
)


def resolve_checkpoint(model: str) -> Checkpoint:
    """The checkpoint that a setting names: by a name or a hub id of the table, or by a local folder.

    Raises:
        ConfigurationError: the setting names none.
    """
    for row in CHECKPOINTS:
        if model in (row.name, row.hub_id):
            return row
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        return _row_for(folder.resolve())
    known = ", ".join(row.name if row.hub_id is None else f"{row.name} ({row.hub_id})" for row in CHECKPOINTS)
    raise ConfigurationError(
        f"SLUICE_MODEL={model} is neither a folder with a config.json nor a known checkpoint: {known}."
    )


def order_image(checkpoint: Checkpoint, order: ImageOrder | None) -> Checkpoint:
    """The checkpoint with the image before or after the policy in its prompts; None: in the order of the row.

    Raises:
        ConfigurationError: the prompts of its family have one order only.
    """
    if order is None:
        return checkpoint
    if not isinstance(checkpoint.family, LlavaGuard):
        raise ConfigurationError(f"SLUICE_IMAGE_ORDER cannot be set for {checkpoint.name}; unset it.")
    return replace(checkpoint, family=replace(checkpoint.family, order=order))


def assume_in_flight(settings: Settings) -> int:
    """Calls at a time of a guard replica, as far as a process without its GPU can know: its GPU may hold fewer."""
    if settings.guard_in_flight is not None:
        return settings.guard_in_flight
    try:
        row = resolve_checkpoint(settings.model)
    except ConfigurationError:  # The folder is on the guard's machine only.
        return _ASSUMED_IN_FLIGHT
    return row.large_gpu_in_flight


def _row_for(folder: Path) -> Checkpoint:
    """The row that matches a folder's config.json."""
    config = read_json(folder / "config.json")
    architecture = (config.get("architectures") or ["none"])[0]
    hidden_size = config.get("hidden_size") or (config.get("text_config") or {}).get("hidden_size")
    rows = [row for row in CHECKPOINTS if architecture in (row.architecture, *row.other_architectures)]
    rows = [row for row in rows if row.hidden_size == hidden_size] or [row for row in rows if row.hidden_size is None]
    if rows:
        # Releases of one size differ only in their name. If neither folder nor config has it, take the newest.
        named = f"{folder.name} {config.get('_name_or_path', '')}".lower()
        return replace(next((row for row in rows if row.name.lower() in named), rows[-1]), folder=folder)
    known = ", ".join(sorted({f"{row.architecture} ({row.hidden_size or 'any other'})" for row in CHECKPOINTS}))
    raise ConfigurationError(
        f"{folder} holds a model of the architecture {architecture} with a hidden size of {hidden_size}; Sluice knows "
        f"these: {known}."
    )

"""The checkpoints that Sluice knows. A new release is a new row of `CHECKPOINTS`.

Where the rows come from: LlavaGuard's repository (github.com/ml-research/LlavaGuard: its README, `llava-configs` and
`server/sglang.py`) for architectures, towers, tokenizers and layouts; the hub for names. What could not be looked up
is marked as unverified. GPU memory is calculated: weights, KV cache for a few images and working space, a little
below what a card of that class really has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from services.core.errors import ConfigurationError
from services.guard.families.base import ModelFamily
from services.guard.families.llavaguard import LlavaGuard
from services.guard.families.shieldgemma import ShieldGemma
from services.guard.safetensors import read_json

GIB: Final = 1 << 30
_TENSOR_PARALLEL_SIZES: Final = (1, 2, 4, 8)
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


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One row: what is known about a set of weights without loading it."""

    name: str
    hub_id: str | None
    architecture: str
    family: ModelFamily
    """How it is asked and its answers are read."""
    max_side_px: int
    """Longest side of an image, in pixels, beyond which this model sees nothing more."""
    gpu_memory_bytes: int
    """What one replica wants on all its GPUs together: weights, KV cache and working space."""
    parameters: int
    """Of the weights with their vision tower, roughly."""
    hidden_size: int | None = None
    """Tells rows of one architecture apart when a local folder is named; None: the row for any other size."""
    vision_tower: str | None = None
    """Hub id of the vision tower, when the checkpoint does not bring one along."""
    tokenizer: str | None = None
    """Hub id of the tokenizer and image processor, when the checkpoint does not bring its own along. A local folder
    may hold them in its folder `tokenizer`."""
    launch_flags: tuple[str, ...] = _FLOAT16
    """float16, since SGLang always loads a LLaVA vision tower so."""
    cuda_flags: tuple[str, ...] = ()
    """Only on a GPU."""
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Changes to its JSON files, by file name."""
    preprocessor: Mapping[str, Any] | None = None
    """Written as preprocessor_config.json instead of the checkpoint's own."""
    tensor_prefix: str = ""
    """What its tensors' names begin with and SGLang does not expect."""
    folder: Path | None = None
    """Where the weights are, for one that is on this machine already."""

    def tensor_parallel_size(self, memory_bytes: Sequence[int]) -> int:
        """Over how many of these GPUs (their memory in bytes) a replica is spread: as few as hold it; 0 if none do."""
        for count in _TENSOR_PARALLEL_SIZES:
            if count <= len(memory_bytes) and count * min(memory_bytes) >= self.gpu_memory_bytes:
                return count
        return 0


def _llava_1_5(version: str, size: str) -> Checkpoint:
    """LLaVA-1.5 as a guard: one CLIP view of 336 px, the image padded to a square."""
    large = size == "13B"
    return Checkpoint(
        name=f"LlavaGuard-{version}-{size}",
        hub_id=f"AIML-TUDA/LlavaGuard-{version}-{size}",
        architecture="LlavaLlamaForCausalLM",
        family=LlavaGuard("vicuna_v1.1", wording="explain" if version == "v1.0" else "describe"),
        max_side_px=336,
        gpu_memory_bytes=(38 if large else 22) * GIB,
        parameters=13_400_000_000 if large else 7_100_000_000,
        hidden_size=5120 if large else 4096,
        vision_tower=_CLIP,
        # The checkpoint's own has no <image> token and no image processor.
        tokenizer=f"llava-hf/llava-1.5-{size.lower()}-hf",
    )


def _onevision(size: str, **fields: Any) -> Checkpoint:
    return Checkpoint(
        name=f"LlavaGuard-v1.2-{size}-OV",
        hub_id=f"AIML-TUDA/LlavaGuard-v1.2-{size}-OV",
        architecture="LlavaQwenForCausalLM",
        family=LlavaGuard("chatml-llava"),
        # The largest side of its anyres grid: 6 tiles of 384 px.
        max_side_px=2304,
        vision_tower=_SIGLIP,
        preprocessor=_SIGLIP_PREPROCESSOR,
        **fields,
    )


def _qwen(size: str, **fields: Any) -> Checkpoint:
    return Checkpoint(
        name=f"QwenGuard-v1.2-{size}",
        hub_id=f"AIML-TUDA/QwenGuard-v1.2-{size}",
        architecture="Qwen2_5_VLForConditionalGeneration",
        family=LlavaGuard("qwen2-vl"),
        # LlavaGuard's evaluation gives it at most 1280 patches of 28 x 28 px.
        max_side_px=1280,
        launch_flags=_BFLOAT16,
        **fields,
    )


CHECKPOINTS: Final = (
    Checkpoint(
        name="tiny",
        hub_id=None,
        architecture="LlavaQwenForCausalLM",
        family=LlavaGuard("chatml-llava", wording="explain"),
        # Its tower sees 64 px, but it was trained on the engine's own scaling of images up to this size.
        max_side_px=384,
        gpu_memory_bytes=2 * GIB,
        parameters=1_000_000,
        folder=Path(__file__).parent / "tiny",
    ),
    _onevision("0.5B", gpu_memory_bytes=12 * GIB, parameters=900_000_000, hidden_size=896),
    _onevision(
        "7B",
        gpu_memory_bytes=38 * GIB,
        parameters=8_000_000_000,
        hidden_size=3584,
        # Its embedding table has this many rows; a config that says less fails while loading.
        overrides={"config.json": {"vocab_size": 152064}},
    ),
    _qwen("3B", gpu_memory_bytes=20 * GIB, parameters=3_800_000_000, hidden_size=2048),
    _qwen("7B", gpu_memory_bytes=22 * GIB, parameters=8_300_000_000, hidden_size=3584),
    _llava_1_5("v1.0", "7B"),
    _llava_1_5("v1.0", "13B"),
    # Unverified: both names. LlavaGuard's repository only names `LlavaGuard-v1.1-7B-hf` and `-13B-hf`.
    _llava_1_5("v1.1", "7B"),
    _llava_1_5("v1.1", "13B"),
    Checkpoint(
        name="LlavaGuard-34B",
        hub_id="AIML-TUDA/LlavaGuard-34B",
        architecture="LlavaLlamaForCausalLM",
        # Unverified: it was trained with LLaVA's `chatml_direct`, which says "Answer the questions." in the system's
        # turn, and is served with SGLang's `chatml-llava`. Its wording is that of v1.0, with which it came out.
        family=LlavaGuard("chatml-llava", wording="explain"),
        # Beyond 336 px its anyres grid makes 2928 tokens of an image, and with a policy's 1200 those are more than the
        # 4096 positions that it has.
        max_side_px=336,
        gpu_memory_bytes=96 * GIB,
        parameters=34_800_000_000,
        hidden_size=7168,
        vision_tower=_CLIP,
        tokenizer="liuhaotian/llava-v1.6-34b-tokenizer",
    ),
    Checkpoint(
        name="ShieldGemma-2-4B",
        hub_id="google/shieldgemma-2-4b-it",
        architecture="ShieldGemma2ForImageClassification",
        family=ShieldGemma(),
        max_side_px=896,
        gpu_memory_bytes=20 * GIB,
        parameters=4_300_000_000,
        # SGLang switches images off for Gemma 3 unless told otherwise.
        launch_flags=(*_BFLOAT16, "--enable-multimodal"),
        # Only this backend lets the tokens of an image see one another, as in training.
        cuda_flags=("--attention-backend", "triton"),
        # It is a Gemma 3 in a wrapper; SGLang knows Gemma 3. The wrapper's processor would write prompts of its own.
        overrides={
            "config.json": {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"},
            "processor_config.json": {"processor_class": "Gemma3Processor"},
        },
        tensor_prefix="model.",
    ),
)


def resolve(model: str) -> Checkpoint:
    """The checkpoint that a setting means: a name of the table, a hub id of it, or a local folder.

    Raises:
        ConfigurationError: it is none of these.
    """
    for row in CHECKPOINTS:
        if model in (row.name, row.hub_id):
            return row
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        return _row_for(folder.resolve())
    known = ", ".join(row.name if row.hub_id is None else f"{row.name} ({row.hub_id})" for row in CHECKPOINTS)
    raise ConfigurationError(
        f"SLUICE_MODEL={model} is neither a folder with a config.json nor a checkpoint that Sluice knows: {known}."
    )


def _row_for(folder: Path) -> Checkpoint:
    """The row that a folder's own config.json means."""
    config = read_json(folder / "config.json")
    architecture = (config.get("architectures") or ["none"])[0]
    hidden_size = config.get("hidden_size") or (config.get("text_config") or {}).get("hidden_size")
    rows = [row for row in CHECKPOINTS if row.architecture == architecture]
    rows = [row for row in rows if row.hidden_size == hidden_size] or [row for row in rows if row.hidden_size is None]
    if rows:
        # Releases of one size differ in nothing but their name, if that is kept somewhere; else the newest is meant.
        named = f"{folder.name} {config.get('_name_or_path', '')}".lower()
        return replace(next((row for row in rows if row.name.lower() in named), rows[-1]), folder=folder)
    known = ", ".join(sorted({f"{row.architecture} ({row.hidden_size or 'any other'})" for row in CHECKPOINTS}))
    raise ConfigurationError(
        f"{folder} holds a model of the architecture {architecture} with a hidden size of {hidden_size}; Sluice knows "
        f"these: {known}."
    )

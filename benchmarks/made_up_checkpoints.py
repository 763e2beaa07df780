"""Checkpoints of random weights in the shapes of LlavaGuard-v1.2, for measuring speed and memory without its weights.

    python benchmarks/made_up_checkpoints.py 7B FOLDER [--tokenizer FOLDER]

A GPU draws the weights if there is one: 15 GB take seconds. The checkpoint has LLaVA-NeXT's layout, with SigLIP beside
it, as `services.guard.checkpoint_staging` expects it.

**Answers.** One channel of the language model is a constant. It makes `Safe` the likeliest token everywhere, and longer
tokens likelier than shorter ones. So every rating is Safe, the words of a grammar have about as many tokens as in
training, and a rationale ends at the limit of tokens only.

**Tokens.** Without `--tokenizer`, the tokenizer is made up too: it splits LlavaGuard's policy into about as many tokens
as Qwen's tokenizer, and its other tokens are random words.
"""

import argparse
import json
import random
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

GRID: Final = [[high * 384, wide * 384] for high in range(1, 7) for wide in range(1, 7)]
"""The pinpoints of LLaVA-OneVision."""
VIEW_PX: Final = 384
PATCHES: Final = 729
"""Of one view of the vision tower."""
POLICY_TOKENS: Final = 1129
"""Of LlavaGuard's policy with Qwen's tokenizer."""

_WORDS: Final = 151643
_SPECIAL: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
_SHARD_BYTES: Final = 2 << 30
_CONSTANT: Final = 4.0
"""The value of channel 0 for every token of text."""
_SAFE_BOOST: Final = 40.0
_LETTER_BOOST: Final = 1.0
"""For each letter of a token, so that greedy decoding under a grammar prefers whole words."""
_BOOSTED_LETTERS: Final = 12
_GAIN: Final = 0.7


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a LLaVA-OneVision."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    """Whether the embedding table is the head too."""
    tower_layers: int = 27
    tower_hidden: int = 1152
    tower_intermediate: int = 4304
    tower_heads: int = 16

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def layer_parameters(self) -> int:
        """Of the matrices of one layer of the language model."""
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_heads * self.head_dim
        return attention + 3 * self.hidden * self.intermediate

    @property
    def language_parameters(self) -> int:
        """That one token of text passes: all layers and the head."""
        return self.layers * self.layer_parameters + self.vocabulary * self.hidden

    @property
    def kv_bytes(self) -> int:
        """Of one token in half precision."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim


SHAPES: Final = {
    "0.5B": Shape("0.5B", 24, 896, 4864, 14, 2, 152000, tied=True),
    "7B": Shape("7B", 28, 3584, 18944, 28, 4, 152064, tied=False),
}

_SMALL_TOWER: Final[dict[str, Any]] = {
    "tower_layers": 3,
    "tower_hidden": 64,
    "tower_intermediate": 128,
    "tower_heads": 4,
}
TINY_SHAPES: Final = {
    "0.5B": Shape("0.5B", 2, 128, 256, 4, 2, 152000, tied=True, **_SMALL_TOWER),
    "7B": Shape("7B", 3, 128, 320, 4, 2, 152064, tied=False, **_SMALL_TOWER),
}
"""Reduced in width and depth, for machines without a GPU."""


def count_views(width: int, height: int) -> int:
    """The views of an image that the vision tower encodes: the whole image, and the tiles of the best grid."""
    best, tiles = (-1, 0), 0
    for high, wide in GRID:
        scale = min(wide / width, high / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        if (used, used - wide * high) > best:
            best, tiles = (used, used - wide * high), wide * high // VIEW_PX**2
    return 1 + tiles


def write_checkpoint(shape: Shape, folder: Path, *, tokenizer: Path | None = None, seed: int = 0) -> None:
    """Fill a folder. Loads PyTorch and transformers."""
    import torch  # noqa: PLC0415 - heavy, and the sizes alone do not need it

    folder.mkdir(parents=True)
    boosts = _make_boosts(shape, _write_tokenizer(folder, tokenizer))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int, std: float | None = None) -> Any:
        scale = _GAIN * size[-1] ** -0.5 if std is None else std
        return torch.empty(*size, dtype=torch.bfloat16, device=device).normal_(0, scale, generator=generator)

    _save_shards(folder, _draw_language_model(shape, draw, torch.tensor(boosts, device=device)))
    (folder / "config.json").write_text(json.dumps(_make_config(shape), indent=2), encoding="utf-8")
    _write_tower(shape, folder / "google" / "siglip-so400m-patch14-384", draw)


def _draw_language_model(shape: Shape, draw: Any, boosts: Any) -> Iterator[tuple[str, Any]]:
    hidden, kv = shape.hidden, shape.kv_heads * shape.head_dim
    embeddings = draw(shape.vocabulary, hidden)
    embeddings[:, 0] = _CONSTANT
    if shape.tied:
        embeddings[:, 0] += boosts
    yield "model.embed_tokens.weight", embeddings
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
            yield f"{prefix}.self_attn.{name}_proj.weight", draw(rows, hidden)
            yield f"{prefix}.self_attn.{name}_proj.bias", draw(rows, std=0.1)
        output, down = draw(hidden, hidden), draw(hidden, shape.intermediate)
        output[0], down[0] = 0, 0  # no layer changes the constant
        yield f"{prefix}.self_attn.o_proj.weight", output
        yield f"{prefix}.mlp.gate_proj.weight", draw(shape.intermediate, hidden)
        yield f"{prefix}.mlp.up_proj.weight", draw(shape.intermediate, hidden)
        yield f"{prefix}.mlp.down_proj.weight", down
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{name}.weight", draw(hidden, std=0) + 1
    yield "model.norm.weight", draw(hidden, std=0) + 1
    if not shape.tied:
        head = draw(shape.vocabulary, hidden)
        head[:, 0] += boosts
        yield "lm_head.weight", head
    yield "model.mm_projector.0.weight", draw(hidden, shape.tower_hidden)
    yield "model.mm_projector.0.bias", draw(hidden, std=0.1)
    yield "model.mm_projector.2.weight", draw(hidden, hidden)
    yield "model.mm_projector.2.bias", draw(hidden, std=0.1)
    yield "model.image_newline", draw(hidden, std=0.1)


def _save_shards(folder: Path, tensors: Iterator[tuple[str, Any]]) -> None:
    from safetensors.torch import save_file  # noqa: PLC0415 - it loads PyTorch

    shards: list[list[str]] = []
    held: dict[str, Any] = {}
    total = 0

    def save() -> None:
        save_file(held, folder / f"model-{len(shards):05}.safetensors", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        held[name] = tensor.cpu()
        total += tensor.nbytes
        if sum(each.nbytes for each in held.values()) >= _SHARD_BYTES:
            save()
    if held:
        save()
    files = {name: f"model-{number:05}.safetensors" for number, names in enumerate(shards) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _make_config(shape: Shape) -> dict[str, Any]:
    """As that of AIML-TUDA/LlavaGuard-v1.2-7B-OV."""
    return {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava",
        "text_config": {"model_type": "llama"},
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-06,
        "hidden_act": "silu",
        "tie_word_embeddings": shape.tied,
        "eos_token_id": 151645,
        "image_token_index": 151646,
        "image_aspect_ratio": "anyres_max_9",
        "image_crop_resolution": None,
        "image_grid_pinpoints": GRID,
        "mm_hidden_size": shape.tower_hidden,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "use_mm_proj": True,
    }


def _write_tower(shape: Shape, folder: Path, draw: Any) -> None:
    import torch  # noqa: PLC0415 - as above
    from transformers import SiglipVisionConfig, SiglipVisionModel  # noqa: PLC0415

    config = SiglipVisionConfig(
        hidden_size=shape.tower_hidden,
        intermediate_size=shape.tower_intermediate,
        num_hidden_layers=shape.tower_layers,
        num_attention_heads=shape.tower_heads,
        image_size=VIEW_PX,
        patch_size=14,
    )
    with torch.device("meta"):
        model = SiglipVisionModel(config)
    tensors = {
        name: draw(*tensor.shape, std=0) + 1
        if "norm" in name and name.endswith("weight")
        else draw(*tensor.shape, std=0.1 if tensor.ndim == 1 else _GAIN * tensor[0].numel() ** -0.5)
        for name, tensor in model.state_dict().items()
    }
    folder.mkdir(parents=True)
    model.to_empty(device=draw(1).device).to(torch.bfloat16).load_state_dict(tensors)
    model.save_pretrained(folder)


def _make_boosts(shape: Shape, tokenizer: Any) -> list[float]:
    """For each token, how much the constant channel adds to its logit."""
    boosts = [0.0] * shape.vocabulary
    for token, number in tokenizer.get_vocab(with_added_tokens=False).items():
        boosts[number] = _LETTER_BOOST * min(len(token), _BOOSTED_LETTERS)
    boosts[tokenizer.encode("Safe").ids[0]] = _SAFE_BOOST
    return boosts


def _write_tokenizer(folder: Path, source: Path | None) -> Any:
    """Write the files of a tokenizer, and return it."""
    from tokenizers import Tokenizer  # noqa: PLC0415 - it loads a native library

    if source is None:
        _make_tokenizer(folder)
    else:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((source / name).read_bytes())
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415 - as above
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    from services.policies.document import PolicyDocument  # noqa: PLC0415

    prompt = PolicyDocument(name="made-up").as_version(1).prompt
    letters = pre_tokenizers.ByteLevel.alphabet()

    def train(merges: int) -> Any:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.train_from_iterator(
            [prompt, "Safe Unsafe"] * 2,
            trainers.BpeTrainer(  # type: ignore[no-untyped-call]
                vocab_size=len(letters) + merges, initial_alphabet=letters, show_progress=False
            ),
        )
        return tokenizer

    # More merges make fewer tokens. The largest number of merges that still makes the wanted number of tokens is looked
    # for by halving.
    low, high = 0, 4096
    while high - low > 1:
        middle = (low + high) // 2
        if len(train(middle).encode(prompt).ids) >= POLICY_TOKENS:
            low = middle
        else:
            high = middle
    model = json.loads(train(low).to_str())["model"]
    vocabulary: dict[str, int] = model["vocab"]
    draw_from = random.Random(0)
    while len(vocabulary) < _WORDS:
        word = "".join(draw_from.choices(string.ascii_letters, k=draw_from.randint(3, 11)))
        vocabulary.setdefault(draw_from.choice(("Ġ", "")) + word, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(pair) for pair in model["merges"]]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="a folder with tokenizer.json and tokenizer_config.json")
    parser.add_argument("--tiny", action="store_true", help="reduced in width and depth")
    given = parser.parse_args()
    shapes = TINY_SHAPES if given.tiny else SHAPES
    write_checkpoint(shapes[given.shape], given.folder, tokenizer=given.tokenizer)

"""The tiny guard in torch, and its checkpoint for SGLang.

It is a small version of LlavaGuard's architecture: a SigLIP tower whose last layer is not used, a projector of two
layers, and a Qwen2 language model. The tower and the language model are modules of transformers, so the trained model
is exactly the one that is served.
"""

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

IMAGE_PX: Final = 64
PATCHES: Final = 8
"""Patches per side. The image has 8 x 8 patches of 8 x 8 pixels, and one token per patch."""
IMAGE_TOKENS: Final = PATCHES * PATCHES
VISION_WIDTH: Final = 96
TOWER: Final = "siglip-tiny"
"""The folder of the vision tower inside the checkpoint."""

_PAD_COLOUR: Final = 127
_VISION: Final[dict[str, Any]] = {
    "hidden_size": VISION_WIDTH,
    "intermediate_size": 288,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "image_size": IMAGE_PX,
    "patch_size": IMAGE_PX // PATCHES,
    "vision_use_head": False,
}
_LANGUAGE: Final[dict[str, Any]] = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_PROJECTOR_NAMES: Final = {"linear_1": "model.mm_projector.0", "linear_2": "model.mm_projector.2"}


def pad_to_square(image: Image.Image, fill: int | tuple[int, int, int]) -> Image.Image:
    """The image in the middle of a square with its longer side, as SGLang pads it."""
    side = max(image.size)
    padded = Image.new(image.mode, (side, side), fill)
    padded.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return padded


def to_pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    """The input of the guard for an RGB image: uint8, shape (64, 64, 3)."""
    padded = pad_to_square(image, (_PAD_COLOUR,) * 3)
    return np.asarray(padded.resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BICUBIC))


class Projector(nn.Module):  # type: ignore[misc]
    """Maps the tower's features to the language model's embeddings: shape (..., 96) to (..., 128)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(VISION_WIDTH, _LANGUAGE["hidden_size"])
        self.linear_2 = nn.Linear(_LANGUAGE["hidden_size"], _LANGUAGE["hidden_size"])

    def forward(self, features: Tensor) -> Tensor:
        projected: Tensor = self.linear_2(functional.gelu(self.linear_1(features)))
        return projected


class TinyGuard(nn.Module):  # type: ignore[misc]
    """The whole model with random weights. The position embeddings of the tower start as a grid of sines."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.image_id = int(tokenizer.convert_tokens_to_ids("<image>"))
        self.vision = SiglipVisionModel(SiglipVisionConfig(**_VISION))
        self.projector = Projector()
        self.language = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **_LANGUAGE))
        with torch.no_grad():
            self.vision.embeddings.position_embedding.weight.copy_(0.3 * _grid_of_sines())

    def encode_images(self, pixels: npt.NDArray[np.uint8]) -> Tensor:
        """The features of images, from uint8 (n, 64, 64, 3) to float (n, 64, 96): the tower's last layer but one."""
        scaled = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
        hidden: Tensor = self.vision.embeddings(scaled)
        for layer in self.vision.encoder.layers[:-1]:
            hidden = layer(hidden, None)
        return hidden

    def encode_prompts(self, ids: Tensor, features: Tensor) -> Tensor:
        """The hidden states (n, length, 128) of token ids (n, length), which have 64 consecutive `<image>` tokens."""
        embedded: Tensor = self.language.model.embed_tokens(ids)
        start = int((ids[0] == self.image_id).nonzero()[0, 0])
        parts = (embedded[:, :start], self.projector(features), embedded[:, start + IMAGE_TOKENS :])
        hidden: Tensor = self.language.model(inputs_embeds=torch.cat(parts, 1), use_cache=False).last_hidden_state
        return hidden


def _grid_of_sines() -> Tensor:
    """Shape (64, 96). Neighbouring patches start with similar positions, which saves the first hundreds of steps."""
    frequencies = 50 ** -(torch.arange(VISION_WIDTH // 4) / (VISION_WIDTH // 4))
    angles = torch.arange(PATCHES)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = line[:, None].expand(-1, PATCHES, -1), line[None].expand(PATCHES, -1, -1)
    return torch.cat([rows, columns], -1).reshape(IMAGE_TOKENS, VISION_WIDTH)


def save_checkpoint(guard: TinyGuard, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the checkpoint in float16, in the form of a LlavaQwenForCausalLM that SGLang 0.5.23 reads.

    `mm_vision_tower` is the name of the tower's folder. SGLang opens it as a path, so the server copies the checkpoint
    first and writes the absolute path into the copy.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    mean = [0.5] * 3  # SGLang also pads with it: int(0.5 * 255) is _PAD_COLOUR
    SiglipImageProcessor(
        size={"height": IMAGE_PX, "width": IMAGE_PX}, resample=Image.Resampling.BICUBIC, image_mean=mean, image_std=mean
    ).save_pretrained(folder)
    end = tokenizer.eos_token_id
    config = {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava",
        "dtype": "float16",
        "vocab_size": len(tokenizer),
        **_LANGUAGE,
        "text_config": {"model_type": "qwen2", "vocab_size": len(tokenizer), **_LANGUAGE},
        "vision_config": {"model_type": "siglip_vision_model", **_VISION},
        "eos_token_id": end,
        "pad_token_id": tokenizer.pad_token_id,
        "image_token_index": guard.image_id,
        "image_seq_length": IMAGE_TOKENS,
        "image_aspect_ratio": "pad",
        "projector_hidden_act": "gelu",
        "mm_hidden_size": VISION_WIDTH,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": TOWER,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"eos_token_id": end, "pad_token_id": tokenizer.pad_token_id})
    weights = dict(guard.language.state_dict())
    for own, name in _PROJECTOR_NAMES.items():
        weights |= {f"{name}.{k}": weight for k, weight in getattr(guard.projector, own).state_dict().items()}
    _write_weights(folder / "model.safetensors", weights)
    guard.vision.config.save_pretrained(folder / TOWER)
    _write_weights(folder / TOWER / "model.safetensors", guard.vision.state_dict())


def load_checkpoint(folder: Path) -> tuple[TinyGuard, PreTrainedTokenizerFast]:
    """Read a checkpoint in float32, ready to judge."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    guard = TinyGuard(tokenizer)
    stored = load_file(folder / "model.safetensors")
    guard.vision.load_state_dict(load_file(folder / TOWER / "model.safetensors"))
    for own, name in _PROJECTOR_NAMES.items():
        getattr(guard.projector, own).load_state_dict({k: stored.pop(f"{name}.{k}") for k in ("weight", "bias")})
    guard.language.load_state_dict(stored)
    return guard.eval(), tokenizer


def _write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    save_file({name: weight.half().contiguous() for name, weight in weights.items()}, path, metadata={"format": "pt"})
    path.chmod(0o644)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

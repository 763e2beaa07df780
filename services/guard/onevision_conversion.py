"""LLaVA-OneVision as transformers lays it out (repositories that end with `-hf`), and as SGLang's LLaVA reads it."""

from collections.abc import Mapping
from typing import Any, Final

from transformers import Qwen2Config, SiglipVisionConfig

_PARTS: Final = ("language_model.", "vision_tower.", "multi_modal_projector.", "image_newline")
_PREFIXES: Final = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.",
    "language_model.": "model.",
    "multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "multi_modal_projector.linear_2.": "model.mm_projector.2.",
    "vision_tower.": "model.vision_tower.vision_tower.",
    "image_newline": "model.image_newline",
}
"""The first that fits counts."""


def to_llava_name(name: str) -> str:
    """The tensor's name in LLaVA-NeXT's own checkpoints. Transformers has used two layouts since version 4.52."""
    plain = _without_model(name)
    for prefix, replacement in _PREFIXES.items():
        if plain.startswith(prefix):
            return replacement + plain.removeprefix(prefix)
    return name


def to_tower_name(name: str) -> str | None:
    """The tensor's name in a checkpoint of the vision tower alone; None if it is not of the tower."""
    plain = _without_model(name)
    if not plain.startswith("vision_tower."):
        return None
    return "vision_model." + plain.removeprefix("vision_tower.").removeprefix("vision_model.")


def to_llava_config(config: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """The config.json of LLaVA-NeXT's trainer, without `mm_vision_tower`.

    `tied`: the language model has no head of its own in the weights.
    """
    text = Qwen2Config(**config["text_config"]).to_dict()
    text["rope_theta"] = (text.get("rope_parameters") or {}).get("rope_theta", text.get("rope_theta"))
    text = {name: value for name, value in text.items() if name not in _NOT_FLAT} | {"tie_word_embeddings": tied}
    return text | {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava",
        "text_config": {"model_type": "llama"},
        "image_token_index": config.get("image_token_index", config.get("image_token_id")),
        "image_aspect_ratio": config.get("vision_aspect_ratio", "anyres_max_9"),
        "image_grid_pinpoints": config["image_grid_pinpoints"],
        "mm_hidden_size": config["vision_config"]["hidden_size"],
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": config.get("vision_feature_layer", -1),
    }


def to_tower_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the vision tower alone."""
    tower: dict[str, Any] = SiglipVisionConfig(**config["vision_config"]).to_dict()
    return tower | {"architectures": ["SiglipVisionModel"]}


_NOT_FLAT: Final = ("architectures", "model_type", "rope_parameters", "transformers_version", "dtype", "torch_dtype")


def _without_model(name: str) -> str:
    plain = name.removeprefix("model.")
    return plain if plain.startswith(_PARTS) else name

"""The conversion of transformers' layout of LLaVA-OneVision to that of LLaVA-NeXT."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.guard.checkpoint_staging import stage
from services.guard.checkpoints import resolve_checkpoint
from services.guard.onevision_conversion import to_llava_config, to_llava_name, to_tower_name
from services.guard.safetensors import extract_tensors
from tests.support import reference_models

CONFIG: dict[str, Any] = {
    "architectures": ["LlavaOnevisionForConditionalGeneration"],
    "model_type": "llava_onevision",
    "image_token_index": 151646,
    "image_grid_pinpoints": [[384, 384], [384, 768]],
    "projector_hidden_act": "gelu",
    # As published: what equals a default is not written.
    "text_config": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "vocab_size": 152000,
    },
    "vision_aspect_ratio": "anyres_max_9",
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "image_size": 384,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 26,
        "patch_size": 14,
        "vision_use_head": False,
    },
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}


@pytest.mark.parametrize(
    ("name", "converted"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("multi_modal_projector.linear_1.weight", "model.mm_projector.0.weight"),
        ("multi_modal_projector.linear_2.bias", "model.mm_projector.2.bias"),
        ("image_newline", "model.image_newline"),
        ("vision_tower.vision_model.a", "model.vision_tower.vision_tower.vision_model.a"),
        ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.multi_modal_projector.linear_2.weight", "model.mm_projector.2.weight"),
        ("model.vision_tower.encoder.a", "model.vision_tower.vision_tower.encoder.a"),
        ("model.image_newline", "model.image_newline"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_tensors_of_both_layouts_get_the_names_of_llava(name: str, converted: str) -> None:
    assert to_llava_name(name) == converted


def test_tensors_of_the_tower_are_found_in_both_layouts() -> None:
    assert to_tower_name("vision_tower.vision_model.a") == to_tower_name("model.vision_tower.a") == "vision_model.a"
    assert to_tower_name("model.language_model.norm.weight") is None


def test_config_has_what_the_trainer_would_have_written() -> None:
    config = to_llava_config(CONFIG, tied=True)
    assert config["architectures"] == ["LlavaQwenForCausalLM"]
    assert (config["hidden_size"], config["num_key_value_heads"], config["mm_hidden_size"]) == (896, 2, 1152)
    assert config["rope_theta"] == 1000000.0
    assert config["rms_norm_eps"] == 1e-06, "left out in the file, as it is Qwen2's default"
    assert config["image_grid_pinpoints"] == [[384, 384], [384, 768]]
    assert (config["mm_patch_merge_type"], config["image_aspect_ratio"]) == ("spatial_unpad", "anyres_max_9")
    assert config["mm_vision_select_layer"] == -1, "its last layer was cut off already"
    assert config["tie_word_embeddings"]
    json.dumps(config)


def test_converted_checkpoint_is_staged_with_its_own_tower(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text('{"added_tokens": [{"id": 151646, "content": "<image>"}]}')
    (folder / "tokenizer_config.json").write_text(
        '{"processor_class": "LlavaOnevisionProcessor", "model_max_length": 9}'
    )
    tower = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    save_file({"language_model.model.embed_tokens.weight": torch.zeros(151936, 1)}, folder / "model-1.safetensors")
    save_file({"image_newline": torch.ones(2), "vision_tower.vision_model.x": tower}, folder / "model-2.safetensors")
    names = {"language_model.model.embed_tokens.weight": "model-1.safetensors", "image_newline": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    before = [(path, path.read_bytes()) for path in sorted(folder.iterdir())]

    staged = stage(resolve_checkpoint(str(folder)), tmp_path / "state")

    config = json.loads((staged.folder / "config.json").read_text())
    assert config["mm_vision_tower"] == str(staged.folder / "siglip")
    assert (config["vocab_size"], config["image_token_index"]) == (151936, 151646)
    assert config["tie_word_embeddings"], "the weights have no head"
    assert set(load_file(staged.folder / "model-2.safetensors")) == {
        "model.image_newline",
        "model.vision_tower.vision_tower.vision_model.x",
    }
    assert torch.equal(load_file(staged.folder / "siglip" / "model.safetensors")["vision_model.x"], tower)
    assert json.loads((staged.folder / "siglip" / "config.json").read_text())["num_hidden_layers"] == 26
    index = json.loads((staged.folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == {"model.embed_tokens.weight": "model-1.safetensors", "model.image_newline": "model-2.safetensors"}
    assert json.loads((staged.folder / "tokenizer_config.json").read_text()) == {"model_max_length": 9}
    assert json.loads((staged.folder / "processor_config.json").read_text())["processor_class"] == "LlavaProcessor"
    assert [(path, path.read_bytes()) for path in sorted(folder.iterdir())] == before, "the source was changed"


def test_whole_model_gets_the_names_of_the_trainers_checkpoint(tmp_path: Path) -> None:
    """The layout is that of the installed transformers, which the engine's test also runs."""
    trained, converted = [
        build(tmp_path / build.__name__)
        for build in (reference_models.onevision, reference_models.onevision_of_transformers)
    ]
    row = replace(resolve_checkpoint("LlavaGuard-v1.2-0.5B-OV-hf"), folder=converted.folder)
    staged = stage(row, tmp_path / "state")
    shapes, theirs = [
        {
            name.replace(".vision_model.", "."): tensor.shape
            for name, tensor in load_file(folder / "model.safetensors").items()
        }
        for folder in (staged.folder, trained.folder)
    ]
    # Tied embeddings have no head.
    assert shapes == {name: shape for name, shape in theirs.items() if name != "lm_head.weight"}


def test_extracted_tensors_keep_their_values(tmp_path: Path) -> None:
    save_file({"a": torch.arange(5), "b": torch.ones(3), "c": torch.zeros(2)}, tmp_path / "1.safetensors")
    save_file({"d": torch.full((2, 2), 7.0)}, tmp_path / "2.safetensors")
    wanted = {"b": "x.b", "d": "x.d"}
    extract_tensors(tmp_path, wanted.get, tmp_path / "out" / "model.safetensors")
    extracted = load_file(tmp_path / "out" / "model.safetensors")
    assert set(extracted) == {"x.b", "x.d"}
    assert torch.equal(extracted["x.b"], torch.ones(3))
    assert torch.equal(extracted["x.d"], torch.full((2, 2), 7.0))

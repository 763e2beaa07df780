"""The made-up checkpoints: staging accepts them, and their language model answers as the benchmark expects."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionModel

from benchmarks.guard_gpu import ROWS
from benchmarks.made_up_checkpoints import POLICY_TOKENS, TINY_SHAPES, Shape, write_checkpoint
from services.guard.checkpoint_staging import stage
from services.guard.checkpoints import resolve_checkpoint
from services.guard.families.llavaguard_format import ANSWER_START
from tests.support.engine import DEFAULT_PROMPT


def build_language_model(shape: Shape, tensors: dict[str, torch.Tensor]) -> Any:
    """Transformers' model with the language model's weights."""
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
    )
    model = Qwen2ForCausalLM(config).eval()
    own = {
        name: tensor.float() for name, tensor in tensors.items() if "projector" not in name and "newline" not in name
    }
    missing, unexpected = model.load_state_dict(own, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if shape.tied else [], [])
    return model


@pytest.mark.parametrize("name", TINY_SHAPES)
def test_made_up_checkpoint_is_staged_and_says_safe_in_long_tokens(name: str, tmp_path: Path) -> None:
    shape, source = TINY_SHAPES[name], tmp_path / "source"
    write_checkpoint(shape, source)

    staged = stage(replace(resolve_checkpoint(ROWS[name]), folder=source), tmp_path / "state").folder
    config = json.loads((staged / "config.json").read_text())
    assert (config["vocab_size"], config["image_token_index"]) == (shape.vocabulary, 151646)
    tower = SiglipVisionModel.from_pretrained(config["mm_vision_tower"])
    assert tower.config.hidden_size == shape.tower_hidden

    tokenizer = Tokenizer.from_file(str(staged / "tokenizer.json"))
    assert len(tokenizer.encode(DEFAULT_PROMPT).ids) == pytest.approx(POLICY_TOKENS, abs=5)
    assert tokenizer.encode("<image>").ids == [151646]
    ids = tokenizer.encode(f"{DEFAULT_PROMPT}{ANSWER_START}Safe").ids
    tensors = {key: tensor for file in staged.glob("*.safetensors") for key, tensor in load_file(file).items()}
    with torch.no_grad():
        logits = build_language_model(shape, tensors)(torch.tensor([ids])).logits[0, -20:]

    (safe,) = tokenizer.encode("Safe").ids
    assert set(logits.argmax(-1).tolist()) == {safe}
    # Where a grammar allows several tokens, a whole word is likelier than its first character.
    (word,) = tokenizer.encode(" category").ids
    assert (logits[:, word] > logits[:, tokenizer.token_to_id("Ġ")]).float().mean() > 0.9

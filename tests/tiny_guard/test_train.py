"""The pieces that the tiny guard is trained with, on a few images and for a few steps."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast, SiglipVisionModel

from pipelines.tiny_guard import train as train_tiny
from pipelines.tiny_guard.corpus import (
    LABELS,
    build_tokenizer,
    draw_categories,
    format_answer,
    render_chat,
    reword,
    waive,
    write_rationale,
)
from pipelines.tiny_guard.model import IMAGE_TOKENS, TOWER, TinyGuard, load_checkpoint, save_checkpoint
from services.core.values import CATEGORIES, NO_CATEGORY
from services.guard.families.llavaguard_format import ANSWER_START

SEEN = ("bloody knife", "red", "calm sea")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="module")
def labeller(tokenizer: PreTrainedTokenizerFast) -> train_tiny.Labeller:
    return train_tiny.Labeller(tokenizer)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("category", LABELS)
@pytest.mark.parametrize("rating", ["Safe", "Unsafe"])
def test_answers_have_form_and_length_of_llavaguards(
    tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator, category: str, rating: str
) -> None:
    short = format_answer(rating, category, None)
    long = format_answer(rating, category, write_rationale(rng, category, rating, SEEN))
    assert short == f'{{\n    "rating": "{rating}",\n    "category": "{category}"\n}}'
    assert long.startswith(short[:-2] + ',\n    "rationale": "')
    assert list(json.loads(long)) == ["rating", "category", "rationale"]
    assert 40 <= len(json.loads(long)["rationale"].split()) <= 65
    assert 18 <= len(tokenizer(short)["input_ids"]) <= 25
    assert 70 <= len(tokenizer(long)["input_ids"]) <= 105
    assert tokenizer.decode(tokenizer(long)["input_ids"]) == long


def test_token_after_the_prefix_is_the_rating(tokenizer: PreTrainedTokenizerFast) -> None:
    prefix = tokenizer(render_chat(waive(())) + ANSWER_START)["input_ids"]
    following = set()
    for rating in ("Safe", "Unsafe"):
        whole = tokenizer(render_chat(waive(())) + format_answer(rating, NO_CATEGORY, None))["input_ids"]
        assert whole[: len(prefix)] == prefix
        assert tokenizer.decode(whole[len(prefix)]) == rating
        following.add(whole[len(prefix)])
    assert len(following) == 2


def test_white_space_around_a_rule_keeps_its_symbol(tokenizer: PreTrainedTokenizerFast) -> None:
    rule = "- Discuss historical events involving hate and harassment."
    assert tokenizer(f"\n {rule}\n")["input_ids"] == tokenizer(rule)["input_ids"]
    assert len(tokenizer(rule)["input_ids"]) == 1


def test_reworded_policy_waives_the_same_categories(rng: np.random.Generator) -> None:
    blocks = waive(draw_categories(rng))
    reworded = [reword(rng, blocks) for _ in range(20)]
    assert all([b.waived for b in one] == [b.waived for b in blocks] for one in reworded)
    assert any(one != blocks for one in reworded)


@pytest.mark.parametrize(
    ("waived", "shown", "rating"),
    [
        ([], CATEGORIES[1], "Unsafe"),
        ([CATEGORIES[1]], CATEGORIES[1], "Safe"),
        ([CATEGORIES[2]], CATEGORIES[1], "Unsafe"),
        ([CATEGORIES[2]], NO_CATEGORY, "Safe"),
    ],
)
def test_waived_category_is_safe_and_keeps_its_name(
    labeller: train_tiny.Labeller,
    tokenizer: PreTrainedTokenizerFast,
    rng: np.random.Generator,
    waived: list[str],
    shown: str,
    rating: str,
) -> None:
    example = labeller.example(rng, waive(waived), shown, SEEN)
    told = json.loads(tokenizer.decode(example.answer, skip_special_tokens=True))
    assert (told["rating"], told["category"]) == (rating, shown)
    assert tokenizer.decode(example.answer[labeller.rating_at]) == rating
    assert tokenizer.decode(example.answer[labeller.category_at]) == shown[:2]
    assert example.prompt.count(tokenizer.convert_tokens_to_ids("<image>")) == IMAGE_TOKENS


def test_checkpoint_loads_with_the_served_tower(
    tokenizer: PreTrainedTokenizerFast, labeller: train_tiny.Labeller, rng: np.random.Generator, tmp_path: Path
) -> None:
    save_checkpoint(TinyGuard(tokenizer), tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["mm_vision_tower"] == TOWER
    guard, _ = load_checkpoint(tmp_path)
    images = train_tiny.draw_images([1, 2], [None, None])
    scaled = torch.from_numpy(images.pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    tower = SiglipVisionModel.from_pretrained(tmp_path / TOWER, dtype=torch.float32)
    served = tower(scaled, output_hidden_states=True).hidden_states[config["mm_vision_select_layer"]]
    assert torch.equal(served, guard.encode_images(images.pixels))
    examples = [labeller.example(rng, waive(()), LABELS[label], None) for label in images.labels]
    assert train_tiny.score_examples(guard, labeller, examples, images.pixels).shape == (2, 2)


def test_few_steps_of_each_stage_lower_the_loss(
    tokenizer: PreTrainedTokenizerFast, labeller: train_tiny.Labeller, rng: np.random.Generator
) -> None:
    torch.manual_seed(0)
    guard = TinyGuard(tokenizer)
    images = train_tiny.draw_training_images(28, workers=1)
    assert {*images.labels.tolist()} == {*range(len(LABELS))}
    assert {*np.unique(images.patches).tolist()} == {*range(len(LABELS))}
    plan = train_tiny.TrainingPlan(images=28, vision_steps=4, vision_batch=14, language_batch=8)
    stage = replace(plan.curriculum[0], steps=6)

    def loss() -> float:
        examples = [labeller.example(rng, waive(()), LABELS[label], None) for label in images.labels]
        ids, weight = labeller.batch(examples)
        with torch.no_grad():
            logits = guard.language.lm_head(guard.encode_prompts(ids, guard.encode_images(images.pixels)))[:, :-1]
        counted = weight[:, 1:] > 0
        return float(torch.nn.functional.cross_entropy(logits[counted], ids[:, 1:][counted]))

    before = loss()
    tower = [weight.clone() for weight in guard.vision.parameters()]
    train_tiny.train_vision(guard, images, plan, rng)
    assert any(not torch.equal(old, new) for old, new in zip(tower, guard.vision.parameters(), strict=True))
    train_tiny.train_language(guard, labeller, images, plan, stage, rng)
    assert loss() < before - 1


def test_random_weights_make_a_complete_checkpoint(tmp_path: Path) -> None:
    assert train_tiny.main(["--out", str(tmp_path), "--random", "--threads", "1"]) == 0
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"}
    assert f"{TOWER}/model.safetensors" in names

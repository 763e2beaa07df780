"""Trains the tiny guard from random weights: `python -m pipelines.tiny_guard.train --out DIR`.

Training has two stages. Both have a fixed number of steps, so a build is reproducible. First the tower learns the
category of each patch, which the mask of the drawing gives. Then, with the tower fixed, the language model learns to
answer under policies that waive and reword categories: first the rating, then the rationale. This takes about 25
minutes on two free cores. The test under waived categories decides whether a build is good, because the model learns
late to connect a waiver with the content of the image.
"""

import argparse
import io
import logging
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

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
from pipelines.tiny_guard.drawings import TRAINING_SEEDS, draw
from pipelines.tiny_guard.model import (
    IMAGE_TOKENS,
    PATCHES,
    VISION_WIDTH,
    TinyGuard,
    load_checkpoint,
    pad_to_square,
    save_checkpoint,
    to_pixels,
)
from services.core.values import NO_CATEGORY
from services.guard.families.llavaguard_format import ANSWER_START
from services.policies.prompt import CategorySection

log = logging.getLogger(__name__)

_HARMLESS: Final = LABELS.index(NO_CATEGORY)
_TRAINING_LABELS: Final = (*LABELS, *[NO_CATEGORY] * 4)
"""The labels of training images, in turn: 36 % are harmless."""
_MIN_COVERAGE: Final = 90
"""A patch has the category of its image if the pictogram covers at least this much of it, of 255."""

ACCEPTED: Final = {"default": 0.985, "waived": 0.98, "category": 0.97}
"""The least shares for a good build on new images: correct ratings under the default policy and with waivers, and
correct categories."""


@dataclass(frozen=True)
class CurriculumStage:
    """A part of the language stage."""

    steps: int
    peak_rate: float
    """The learning rate after the warm-up."""
    reworded_share: float
    """The share of batches with reworded policies."""
    explained_share: float
    """The share of batches whose answers have a rationale."""
    word_weight: float
    """The weight of a token of the answer in the loss. The rating has 5, the category 3."""


@dataclass(frozen=True)
class TrainingPlan:
    """The amount of training: numbers of images and steps."""

    images: int = 60_000
    vision_steps: int = 2_500
    vision_batch: int = 128
    language_batch: int = 48
    curriculum: tuple[CurriculumStage, ...] = (
        CurriculumStage(steps=900, peak_rate=1e-2, reworded_share=0.2, explained_share=0.2, word_weight=0.05),
        # Ratings are learned first. Rationales are easy, but so long that they would take most of the time.
        CurriculumStage(steps=500, peak_rate=4e-3, reworded_share=0.3, explained_share=0.6, word_weight=0.15),
    )


@dataclass(frozen=True)
class TrainingImages:
    """Drawings as the guard gets them, one row per image."""

    pixels: npt.NDArray[np.uint8]
    """Shape (n, 64, 64, 3)."""
    labels: npt.NDArray[np.int64]
    """Shape (n,): indexes into LABELS."""
    patches: npt.NDArray[np.int64]
    """Shape (n, 8, 8): the label of each patch, as indexes into LABELS."""
    seen: list[tuple[str, str, str]]
    """The thing, its colour, and the scene of each image."""


def draw_images(seeds: Sequence[int], labels: Sequence[str | None], workers: int = 1) -> TrainingImages:
    """Draw one image for each seed and label, and apply JPEG and SGLang's padding and scaling."""
    if workers == 1:
        rows = [_draw_one(seed, label) for seed, label in zip(seeds, labels, strict=True)]
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            rows = list(pool.map(_draw_one, seeds, labels, chunksize=250))
    pixels, coverage, shown, seen = zip(*rows, strict=True)
    label = np.array([LABELS.index(category) for category in shown])
    patches = np.where(np.stack(coverage) >= _MIN_COVERAGE, label[:, None, None], _HARMLESS)
    return TrainingImages(np.stack(pixels), label, patches, list(seen))


def _draw_one(seed: int, label: str | None) -> tuple[Any, Any, str, tuple[str, str, str]]:
    sample = draw(seed, label)
    coverage = pad_to_square(sample.mask, 0).resize((PATCHES, PATCHES), Image.Resampling.BOX)
    pixels = to_pixels(Image.open(io.BytesIO(sample.jpeg)))
    return pixels, np.asarray(coverage), sample.category, (sample.thing, sample.colour, sample.scene)


def draw_training_images(count: int, workers: int) -> TrainingImages:
    """Draw the images for training, from TRAINING_SEEDS."""
    return draw_images(
        TRAINING_SEEDS[:count], [_TRAINING_LABELS[i % len(_TRAINING_LABELS)] for i in range(count)], workers
    )


class Optimizer:
    """Muon for the matrices inside the layers, AdamW for the rest, with a warm-up and a cosine schedule to zero.

    With Muon, training takes a third of the steps that AdamW alone needs.
    """

    def __init__(self, layers: nn.Module, others: Sequence[nn.Module], steps: int, peak_rate: float) -> None:
        matrices = [weight for weight in layers.parameters() if weight.ndim == 2]
        rest = [weight for weight in layers.parameters() if weight.ndim != 2]
        rest += [weight for module in others for weight in module.parameters()]
        self._weights = matrices + rest
        optimizers = (
            torch.optim.Muon(matrices, lr=peak_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98)),
        )
        warm_up = max(1, min(60, steps // 5))

        def share(step: int) -> float:
            after = max(0, step - warm_up) / max(1, steps - warm_up)
            return float(min(1.0, (step + 1) / warm_up) * (0.5 + 0.5 * np.cos(np.pi * after)))

        self._optimizers = [(one, torch.optim.lr_scheduler.LambdaLR(one, share)) for one in optimizers]

    def step(self, loss: Tensor) -> None:
        """Take one step along the gradient of `loss`."""
        loss.backward()
        nn.utils.clip_grad_norm_(self._weights, 1.0)
        for optimizer, schedule in self._optimizers:
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def train_vision(guard: TinyGuard, images: TrainingImages, plan: TrainingPlan, rng: np.random.Generator) -> None:
    """Train the tower to label each patch and the whole image, with two linear heads that are discarded afterwards."""
    norm = nn.LayerNorm(VISION_WIDTH)
    patch_head, image_head = (nn.Linear(VISION_WIDTH, len(LABELS)) for _ in range(2))
    used = guard.vision.encoder.layers[:-1]
    optimizer = Optimizer(
        used, [guard.vision.embeddings, norm, patch_head, image_head], plan.vision_steps, peak_rate=1e-2
    )
    for step in range(plan.vision_steps):
        rows = np.sort(rng.choice(len(images.pixels), plan.vision_batch, replace=False))
        mirror = slice(None, None, -1 if rng.random() < 0.5 else 1)
        features = norm(guard.encode_images(images.pixels[rows][:, :, mirror]))
        patches = torch.from_numpy(np.ascontiguousarray(images.patches[rows][:, :, mirror])).flatten()
        # The tower does not learn without the loss of the patches, which locates the pictogram.
        patch_loss = functional.cross_entropy(patch_head(features).flatten(0, 1), patches)
        image_loss = functional.cross_entropy(image_head(features.mean(1)), torch.from_numpy(images.labels[rows]))
        optimizer.step(image_loss + 2 * patch_loss)
        if step % 100 == 99:
            log.info("vision %d: image %.3f patch %.3f", step + 1, image_loss.item(), patch_loss.item())


@dataclass(frozen=True)
class Example:
    """A policy with an image, and the correct answer, as token ids."""

    prompt: list[int]
    answer: list[int]
    rating: str
    category: str
    waived: frozenset[str]


class Labeller:
    """Makes training examples from images and policies."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self.end, self.pad = int(tokenizer.eos_token_id), int(tokenizer.pad_token_id)
        self._image = int(tokenizer.convert_tokens_to_ids("<image>"))
        self.safe, self.unsafe = (self._ids(rating)[0] for rating in ("Safe", "Unsafe"))
        self.rating_at = len(self._ids(ANSWER_START))
        """The index of the token of an answer that is its rating."""
        self.category_at = self.rating_at + len(self._ids('Safe",\n    "category": "'))
        """The index of the token of an answer that names the category."""

    def example(
        self,
        rng: np.random.Generator,
        sections: Sequence[CategorySection],
        category: str,
        seen: tuple[str, str, str] | None,
    ) -> Example:
        """The example for a category. `seen` is the content of the rationale; None for an answer without one."""
        waived = frozenset(section.category for section in sections if section.waived)
        rating = "Safe" if category == NO_CATEGORY or category in waived else "Unsafe"
        text = format_answer(rating, category, write_rationale(rng, category, rating, seen) if seen else None)
        prompt = self._ids(render_chat(sections))
        at = prompt.index(self._image)
        prompt[at : at + 1] = [self._image] * IMAGE_TOKENS
        return Example(prompt, [*self._ids(text), self.end], rating, category, waived)

    def batch(self, examples: Sequence[Example], word_weight: float = 1) -> tuple[Tensor, Tensor]:
        """The ids (n, length), padded at the end, and the weight of each in the loss (0 outside of answers)."""
        length = max(len(example.prompt) + len(example.answer) for example in examples)
        ids = torch.full((len(examples), length), self.pad)
        weight = torch.zeros(len(examples), length)
        for row, example in enumerate(examples):
            start, end = len(example.prompt), len(example.prompt) + len(example.answer)
            ids[row, :end] = torch.tensor(example.prompt + example.answer)
            weight[row, start:end] = word_weight
            weight[row, start + self.rating_at] = 5.0
            weight[row, start + self.category_at] = 3.0
        return ids, weight

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text)["input_ids"]
        return ids


def train_language(
    guard: TinyGuard,
    labeller: Labeller,
    images: TrainingImages,
    plan: TrainingPlan,
    stage: CurriculumStage,
    rng: np.random.Generator,
) -> None:
    """Train the projector and the language model to answer. The tower stays fixed, which halves the cost of a step."""
    language = guard.language.model
    others = [guard.projector, language.embed_tokens, language.norm, guard.language.lm_head]
    optimizer = Optimizer(language.layers, others, stage.steps, stage.peak_rate)
    for step in range(stage.steps):
        # Long texts have batches of their own, because a batch is padded to its longest text.
        reworded, explained = rng.random() < stage.reworded_share, rng.random() < stage.explained_share
        count = plan.language_batch // 2 if reworded or explained else plan.language_batch
        rows = rng.choice(len(images.pixels), count, replace=False)
        examples = []
        for row in rows:
            category = LABELS[images.labels[row]]
            sections = waive(_draw_waived(rng, category))
            sections = reword(rng, sections) if reworded else sections
            examples.append(labeller.example(rng, sections, category, images.seen[row] if explained else None))
        ids, weight = labeller.batch(examples, stage.word_weight)
        with torch.no_grad():
            features = guard.encode_images(images.pixels[rows])
        hidden, wanted, counts = guard.encode_prompts(ids, features)[:, :-1], ids[:, 1:], weight[:, 1:]
        losses = functional.cross_entropy(
            guard.language.lm_head(hidden[counts > 0]), wanted[counts > 0], reduction="none"
        )
        loss = (losses * counts[counts > 0]).sum() / count
        optimizer.step(loss)
        if step % 50 == 49:
            log.info("language %d: %.3f", step + 1, loss.item())


def _draw_waived(rng: np.random.Generator, shown: str) -> list[str]:
    """The categories that a policy in training waives: mostly 1 to 3, and often the one of the image."""
    if rng.random() < 0.3:
        return []
    waived = draw_categories(rng, 3 if rng.random() < 0.9 else 9)
    if shown != NO_CATEGORY and rng.random() < 0.35:
        waived[0] = shown
    return waived


def score_examples(
    guard: TinyGuard, labeller: Labeller, examples: Sequence[Example], pixels: npt.NDArray[np.uint8]
) -> npt.NDArray[np.bool_]:
    """Whether the guard's rating and category are correct, shape (examples, 2). It gets the correct rating first."""
    right = []
    for start in range(0, len(examples), 64):
        part = examples[start : start + 64]
        ids, _ = labeller.batch(part)
        with torch.inference_mode():
            logits = guard.language.lm_head(guard.encode_prompts(ids, guard.encode_images(pixels[start : start + 64])))
        for row, example in enumerate(part):
            before = logits[row, len(example.prompt) - 1 :]
            unsafe = before[labeller.rating_at, labeller.unsafe] > before[labeller.rating_at, labeller.safe]
            category = int(before[labeller.category_at].argmax())
            right.append(
                (bool(unsafe) == (example.rating == "Unsafe"), category == example.answer[labeller.category_at])
            )
    return np.array(right)


def evaluate_checkpoint(folder: Path, count: int = 2_000, workers: int = 1) -> dict[str, float]:
    """Judge `count` new images, half of them harmless, with the checkpoint in `folder`. Returns shares in [0, 1].

    `default`, `waived`, `reworded`: correct ratings under the default policy, with 1 to 3 random categories waived, and
    with reworded rules in addition. `permitted`: the rating is Safe if the category of the image is waived (the policy
    exception rate). `category`: correct categories under the default policy.
    """
    guard, tokenizer = load_checkpoint(folder)
    labeller, rng = Labeller(tokenizer), np.random.default_rng(1)
    images = draw_images(range(count), [None] * count, workers)
    shown = [LABELS[label] for label in images.labels]
    waived = [waive(draw_categories(rng)) for _ in shown]
    policies = {
        "default": [waive(()) for _ in shown],
        "waived": waived,
        "reworded": [reword(rng, sections) for sections in waived],
        "permitted": [waive({category}) for category in shown],
    }
    shares = {}
    for name, sections in policies.items():
        examples = [labeller.example(rng, one, category, None) for one, category in zip(sections, shown, strict=True)]
        right = score_examples(guard, labeller, examples, images.pixels)
        counted = images.labels != _HARMLESS if name == "permitted" else slice(None)
        shares[name] = float(right[counted, 0].mean())
        if name == "default":
            shares["category"] = float(right[:, 1].mean())
    return shares


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the checkpoint. The exit status is 1 if it is not good enough."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.tiny_guard.train", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument(
        "--random", action="store_true", help="write random weights, without training: the same files in seconds"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    tokenizer = build_tokenizer()
    guard = TinyGuard(tokenizer)
    if options.random:
        save_checkpoint(guard, tokenizer, options.out)
        return 0
    plan = TrainingPlan()
    images = draw_training_images(plan.images, options.threads)
    log.info("drew %d images", plan.images)
    train_vision(guard, images, plan, rng)
    save_checkpoint(guard, tokenizer, options.out)
    for stage in plan.curriculum:
        train_language(guard, Labeller(tokenizer), images, plan, stage, rng)
        save_checkpoint(guard, tokenizer, options.out)
    shares = evaluate_checkpoint(options.out, workers=options.threads)
    accepted = all(shares[name] >= least for name, least in ACCEPTED.items())
    log.info(
        "%s: %s", "accepted" if accepted else "NOT accepted", {name: f"{share:.2%}" for name, share in shares.items()}
    )
    return 0 if accepted else 1


if __name__ == "__main__":
    sys.exit(main())

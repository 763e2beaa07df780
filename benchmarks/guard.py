"""How well `tiny` judges, and how fast this guard is against LlavaGuard's own way of asking the same engine.

    python benchmarks/guard.py [--images 1000] [--timed 400] [--concurrency 16] [--json]

Accuracy: fresh drawn images (seeds that no training uses), once under the default policy and once under a policy of
its own for each image with 1 to 3 categories waived; for half of the images that show a pictogram, its category is
among the waived ones.

Speed: images per second of three ways to ask one engine about the same images, 5 % of them unsafe, at the same
concurrency, in rounds that take turns; the medians are compared. `chat` is how LlavaGuard's model card asks: the
OpenAI chat API, free-running JSON with a rationale, temperature 0.2, top_p 0.95, top_k 50, at most 500 tokens.
"""

import argparse
import asyncio
import base64
import json
import logging
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.tiny_guard.drawings import draw
from services.core.errors import GuardFailed, GuardUnavailable
from services.core.settings import Settings
from services.core.values import CATEGORIES, NO_CATEGORY, Assessment, Policy, PreparedImage
from services.guard.checkpoints import resolve
from services.guard.engine import Engine
from services.guard.inference import GuardInference
from services.images.decode import Limits, prepare
from services.images.decoder_pool import DecoderPool
from services.moderation.cascade import PolicyAssessment, assess_each
from services.moderation.retrying import RetryingGuard, RetryingPreparer
from services.policies.document import PolicyDocument

FRESH_SEED = 3_000_000_000
UNSAFE_SHARE = 0.05
ROUNDS = 3


@dataclass(frozen=True)
class Image:
    """A drawn image as the guard sees it, and its category under the default policy."""

    prepared: PreparedImage
    category: str


@dataclass(frozen=True)
class Timed:
    """One way of asking, over all images of one round."""

    images_per_s: float
    mean_tokens: float


def drawn(count: int, side_px: int, labels: Callable[[int], str | None]) -> list[Image]:
    limits = Limits(image_px=1_000_000, side_px=side_px)
    samples = [draw(FRESH_SEED + number, labels(number)) for number in range(count)]
    return [Image(prepare(sample.jpeg, limits), sample.category) for sample in samples]


def policy(waived: Sequence[str] = (), **fields: Any) -> Policy:
    modes = {category.partition(":")[0]: "waive" for category in waived}
    return PolicyDocument.model_validate({"name": "benchmark", "categories": modes} | fields).as_version(1)


def waived_for(image: Image, rng: random.Random) -> tuple[str, ...]:
    """1 to 3 categories; with a pictogram, its own among them half of the time."""
    shown = [image.category] if image.category != NO_CATEGORY and rng.random() < 0.5 else []
    others = [category for category in CATEGORIES if category != image.category]
    return (*shown, *rng.sample(others, rng.randint(1, 3) - len(shown)))


async def gather(concurrency: int, work: Sequence[Callable[[], Awaitable[Any]]]) -> list[Any]:
    slots = asyncio.Semaphore(concurrency)

    async def one(call: Callable[[], Awaitable[Any]]) -> Any:
        async with slots:
            return await call()

    return await asyncio.gather(*(one(call) for call in work))


async def accuracy(guard: GuardInference, images: Sequence[Image], concurrency: int) -> dict[str, float]:
    rng = random.Random(FRESH_SEED)
    default = policy()

    async def judge(image: Image, by: Policy) -> Assessment:
        return await guard.assess(image.prepared, by, "verdict")

    answers = await gather(concurrency, [lambda image=image: judge(image, default) for image in images])
    rated = [
        answer.rating == ("Safe" if image.category == NO_CATEGORY else "Unsafe")
        for image, answer in zip(images, answers, strict=True)
    ]
    named = [image.category == answer.category for image, answer in zip(images, answers, strict=True)]
    waivers = [waived_for(image, rng) for image in images]
    policies = [policy(waived) for waived in waivers]
    answers = await gather(
        concurrency,
        [lambda image=image, by=by: judge(image, by) for image, by in zip(images, policies, strict=True)],
    )
    obeyed = [
        answer.rating == ("Safe" if image.category in (NO_CATEGORY, *waived) else "Unsafe")
        for image, waived, answer in zip(images, waivers, answers, strict=True)
    ]
    exempt = [ok for image, waived, ok in zip(images, waivers, obeyed, strict=True) if image.category in waived]
    return {
        "rating_accuracy_default": statistics.mean(rated),
        "rating_accuracy_waived": statistics.mean(obeyed),
        "shown_category_waived_judged_safe": statistics.mean(exempt),
        "category_accuracy": statistics.mean(named),
    }


async def flush(engine: Engine) -> None:
    """Empty the engine's cache; it refuses while it has a request, which the last one or a probe may be."""
    for _ in range(100):
        try:
            await engine.call("/flush_cache", {})
        except GuardUnavailable:
            return  # done: the answer is text, not JSON
        except GuardFailed:
            await asyncio.sleep(0.1)
    raise RuntimeError("the engine does not empty its cache")


async def timed(engine: Engine, concurrency: int, calls: Sequence[Callable[[], Awaitable[int]]]) -> Timed:
    """Each call returns the tokens that its answer took."""
    await flush(engine)  # nobody profits from what the one before has left
    started = time.perf_counter()
    tokens = await gather(concurrency, calls)
    return Timed(len(calls) / (time.perf_counter() - started), statistics.mean(tokens))


async def speed(
    guard: GuardInference, engine: Engine, images: Sequence[Image], concurrency: int
) -> dict[str, list[Timed]]:
    settings = Settings(model="tiny")
    preparer = DecoderPool(settings, guard.max_side_px)

    async def chat(image: Image) -> int:
        url = f"data:{image.prepared.media_type};base64,{base64.b64encode(image.prepared.data).decode()}"
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": policy().prompt},
        ]
        answer = await engine.call(
            "/v1/chat/completions",
            {
                "model": "tiny",
                "messages": [{"role": "user", "content": content}],
                "temperature": 0.2,
                "top_p": 0.95,
                "top_k": 50,
                "max_tokens": 500,
            },
        )
        return int(answer["usage"]["completion_tokens"])

    def by(judged_by: Policy) -> Callable[[Image], Awaitable[int]]:
        async def ours(image: Image) -> int:
            (answer,) = await assess_each(
                image.prepared, [judged_by], "live", guard=RetryingGuard(guard), preparer=RetryingPreparer(preparer)
            )
            said = answer.answer if isinstance(answer, PolicyAssessment) else None
            return said.output_tokens if isinstance(said, Assessment) else 0

        return ours

    ways = {"chat": chat, "full": by(policy()), "adaptive": by(policy(effort="adaptive"))}
    results: dict[str, list[Timed]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, ask in ways.items():
            result = await timed(engine, concurrency, [lambda image=image, ask=ask: ask(image) for image in images])
            results[name].append(result)
            say(f"{name:<9} {result.images_per_s:6.2f} images/s, {result.mean_tokens:5.1f} tokens an answer")
    preparer.close()
    return results


async def main(arguments: argparse.Namespace) -> dict[str, float]:
    checkpoint = resolve("tiny")
    checkpoint = replace(checkpoint, launch_flags=(*checkpoint.launch_flags, "--chat-template", "chatml-llava"))
    with tempfile.TemporaryDirectory(prefix="sluice-benchmark-") as folder:
        engine = Engine(checkpoint, state_dir=Path(folder), in_flight=arguments.concurrency)
        say("starting the engine")
        async with engine:
            guard = GuardInference(engine, in_flight=arguments.concurrency)
            images = drawn(arguments.images, guard.max_side_px, lambda _: None)
            figures = await accuracy(guard, images, arguments.concurrency)
            for name, value in figures.items():
                say(f"{name:<36} {value:.4f}")
            unsafe_every = round(1 / UNSAFE_SHARE)
            timed_images = drawn(
                arguments.timed,
                guard.max_side_px,
                lambda number: NO_CATEGORY if number % unsafe_every else CATEGORIES[number // unsafe_every % 9],
            )
            results = await speed(guard, engine, timed_images, arguments.concurrency)
    median = {name: statistics.median(one.images_per_s for one in rounds) for name, rounds in results.items()}
    for name, rounds in results.items():
        figures[f"images_per_s_{name}"] = median[name]
        figures[f"mean_answer_tokens_{name}"] = statistics.mean(one.mean_tokens for one in rounds)
    figures["ratio_full"] = median["full"] / median["chat"]
    figures["ratio_adaptive"] = median["adaptive"] / median["chat"]
    return {name: round(value, 4) for name, value in figures.items()}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="for accuracy")
    parser.add_argument("--timed", type=int, default=400, help="for speed, a round")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--json", action="store_true", help="end with one JSON line on stdout")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    found = asyncio.run(main(given))
    if given.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:<36} {value}")

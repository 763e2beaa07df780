"""The accuracy of `tiny`, and the speed of Sluice's requests compared with LlavaGuard's own, on the same engine.

    python benchmarks/guard.py [--images 1000] [--timed 400] [--concurrency 16] [--json]

Accuracy: freshly drawn images, with seeds that no training uses. Each image is judged twice: under the default policy,
and under its own policy with 1 to 3 categories waived. For half of the images with a pictogram, the category of the
pictogram is among the waived ones.

Speed: images per second of three kinds of requests to one engine, for the same images, 5 % of them unsafe, at the same
concurrency. The kinds take turns for several rounds; the medians are compared. `chat` is the request of LlavaGuard's
model card: the OpenAI chat API, free-running JSON with a rationale, temperature 0.2, top_p 0.95, top_k 50, at most 500
tokens.
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
from services.guard.checkpoints import resolve_checkpoint
from services.guard.engine import Engine
from services.guard.inference import GuardInference
from services.images.decode import Limits, prepare
from services.images.decoder_pool import DecoderPool
from services.moderation.cascade import PolicyAssessment, assess_under_policies
from services.moderation.retrying_ports import RetryingGuard, RetryingPreparer
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
class RoundResult:
    """One kind of request, over all images of one round."""

    images_per_s: float
    mean_tokens: float


def draw_images(count: int, side_px: int, labels: Callable[[int], str | None]) -> list[Image]:
    limits = Limits(image_px=1_000_000, side_px=side_px)
    samples = [draw(FRESH_SEED + number, labels(number)) for number in range(count)]
    return [Image(prepare(sample.jpeg, limits), sample.category) for sample in samples]


def policy(waived: Sequence[str] = (), **fields: Any) -> Policy:
    modes = {category.partition(":")[0]: "waive" for category in waived}
    return PolicyDocument.model_validate({"name": "benchmark", "categories": modes} | fields).as_version(1)


def choose_waived(image: Image, rng: random.Random) -> tuple[str, ...]:
    """1 to 3 categories; for half of the pictograms, the shown category is among them."""
    shown = [image.category] if image.category != NO_CATEGORY and rng.random() < 0.5 else []
    others = [category for category in CATEGORIES if category != image.category]
    return (*shown, *rng.sample(others, rng.randint(1, 3) - len(shown)))


async def gather_limited(concurrency: int, work: Sequence[Callable[[], Awaitable[Any]]]) -> list[Any]:
    slots = asyncio.Semaphore(concurrency)

    async def run(call: Callable[[], Awaitable[Any]]) -> Any:
        async with slots:
            return await call()

    return await asyncio.gather(*(run(call) for call in work))


async def measure_accuracy(guard: GuardInference, images: Sequence[Image], concurrency: int) -> dict[str, float]:
    rng = random.Random(FRESH_SEED)
    default = policy()

    async def judge(image: Image, by: Policy) -> Assessment:
        (assessment,) = await guard.assess_each(image.prepared, [by], "verdict")
        return assessment

    answers = await gather_limited(concurrency, [lambda image=image: judge(image, default) for image in images])
    rated = [
        answer.rating == ("Safe" if image.category == NO_CATEGORY else "Unsafe")
        for image, answer in zip(images, answers, strict=True)
    ]
    named = [image.category == answer.category for image, answer in zip(images, answers, strict=True)]
    waivers = [choose_waived(image, rng) for image in images]
    policies = [policy(waived) for waived in waivers]
    answers = await gather_limited(
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


async def flush_cache(engine: Engine) -> None:
    """Empty the engine's cache. The engine refuses while it has a request, such as a probe, so try until it is idle."""
    for _ in range(100):
        try:
            await engine.call("/flush_cache", {})
        except GuardUnavailable:
            return  # the cache is empty: the engine answered with text instead of JSON
        except GuardFailed:
            await asyncio.sleep(0.1)
    raise RuntimeError("the engine did not empty its cache within 10 s; it is never idle")


async def time_round(engine: Engine, concurrency: int, calls: Sequence[Callable[[], Awaitable[int]]]) -> RoundResult:
    """Run the calls of one round. Each call returns the number of tokens of its answer."""
    await flush_cache(engine)  # no kind profits from the requests of the one before
    started = time.perf_counter()
    tokens = await gather_limited(concurrency, calls)
    return RoundResult(len(calls) / (time.perf_counter() - started), statistics.mean(tokens))


async def measure_speed(
    guard: GuardInference, engine: Engine, images: Sequence[Image], concurrency: int
) -> dict[str, list[RoundResult]]:
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

    def request_under(judged_by: Policy) -> Callable[[Image], Awaitable[int]]:
        async def request(image: Image) -> int:
            (answer,) = await assess_under_policies(
                image.prepared, [judged_by], "live", guard=RetryingGuard(guard), preparer=RetryingPreparer(preparer)
            )
            assessment = answer.answer if isinstance(answer, PolicyAssessment) else None
            return assessment.output_tokens if isinstance(assessment, Assessment) else 0

        return request

    kinds = {"chat": chat, "full": request_under(policy()), "adaptive": request_under(policy(effort="adaptive"))}
    results: dict[str, list[RoundResult]] = {name: [] for name in kinds}
    for _ in range(ROUNDS):
        for name, ask in kinds.items():
            result = await time_round(
                engine, concurrency, [lambda image=image, ask=ask: ask(image) for image in images]
            )
            results[name].append(result)
            progress(f"{name:<9} {result.images_per_s:6.2f} images/s, {result.mean_tokens:5.1f} tokens an answer")
    preparer.close()
    return results


async def main(arguments: argparse.Namespace) -> dict[str, float]:
    checkpoint = resolve_checkpoint("tiny")
    checkpoint = replace(checkpoint, launch_flags=(*checkpoint.launch_flags, "--chat-template", "chatml-llava"))
    with tempfile.TemporaryDirectory(prefix="sluice-benchmark-") as folder:
        engine = Engine(checkpoint, state_dir=Path(folder), in_flight=arguments.concurrency)
        progress("starting the engine")
        async with engine:
            guard = GuardInference(engine, in_flight=arguments.concurrency)
            images = draw_images(arguments.images, guard.max_side_px, lambda _: None)
            figures = await measure_accuracy(guard, images, arguments.concurrency)
            for name, value in figures.items():
                progress(f"{name:<36} {value:.4f}")
            unsafe_every = round(1 / UNSAFE_SHARE)
            timed_images = draw_images(
                arguments.timed,
                guard.max_side_px,
                lambda number: NO_CATEGORY if number % unsafe_every else CATEGORIES[number // unsafe_every % 9],
            )
            results = await measure_speed(guard, engine, timed_images, arguments.concurrency)
    median = {name: statistics.median(one.images_per_s for one in rounds) for name, rounds in results.items()}
    for name, rounds in results.items():
        figures[f"images_per_s_{name}"] = median[name]
        figures[f"mean_answer_tokens_{name}"] = statistics.mean(one.mean_tokens for one in rounds)
    figures["ratio_full"] = median["full"] / median["chat"]
    figures["ratio_adaptive"] = median["adaptive"] / median["chat"]
    return {name: round(value, 4) for name, value in figures.items()}


def progress(line: str) -> None:
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

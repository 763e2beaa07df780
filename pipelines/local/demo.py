"""`sluice demo`: submits drawings to a service on embedded backends, without any configuration."""

import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from rich import box
from rich.console import Console
from rich.table import Table

from pipelines.clients import streams
from pipelines.local.backends import unset_settings
from pipelines.local.up import Progress, run_service
from pipelines.tiny_guard.drawings import draw
from services.core.messages import DeadLetter, Submission, Verdict
from services.core.s3 import Bucket, s3_client
from services.core.settings import Settings
from services.core.values import CATEGORIES, NO_CATEGORY
from services.streams.base import Message
from services.streams.config import StreamConfig
from services.streams.factory import open_reader

_SEED: Final = 2026
_TIMEOUT_S: Final = 120.0
_WIDTH_CHARS: Final = 100
_NEXT_STEPS: Final = """
These images were drawn by Sluice and judged by `tiny`, a checkpoint of a few megabytes that knows nothing but such
drawings. The demo shows the path of a submission, not the answers of LlavaGuard: never moderate with `tiny`.

Next:
  sluice up --embedded               the same service, running until Ctrl-C
  sluice submit s3://uploads/...     or files of your own (in another terminal, same folder)
  sluice verdicts --follow           what comes out
README.md says how to run on your own Kafka, bucket and GPUs."""


@dataclass(frozen=True, slots=True)
class _DemoImage:
    """An image of the demo."""

    name: str
    shows: str
    data: bytes


def demonstrate(progress: Progress) -> bool:
    """Run the demo, and print a table of the outcomes. Returns whether every submission was settled."""
    unset_settings()
    with run_service(embed=True, progress=progress) as (settings, _):
        images = _draw_images()
        progress(f"submitting {len(images)} drawn images")
        outcomes = asyncio.run(_judge(images, settings, progress))
        Console(width=None if sys.stdout.isatty() else _WIDTH_CHARS).print(_make_table(images, outcomes))
        print(_NEXT_STEPS)  # noqa: T201 - the demo's output
    return len(outcomes) == len(images)


def _draw_images() -> list[_DemoImage]:
    labels = (NO_CATEGORY, *CATEGORIES, NO_CATEGORY)
    drawn = [draw(_SEED + number, label) for number, label in enumerate(labels)]
    samples = [
        _DemoImage(f"drawing-{number:02d}.jpg", sample.category.partition(":")[0], sample.jpeg)
        for number, sample in enumerate(drawn)
    ]
    broken = samples[0].data[: len(samples[0].data) // 2]
    return [
        *samples,
        _DemoImage("cut-off.jpg", "?", broken),
        _DemoImage("notes.jpg", "?", b"not a picture\n"),
    ]


async def _judge(images: list[_DemoImage], settings: Settings, progress: Progress) -> dict[str, Verdict | DeadLetter]:
    """Upload and submit the images, and wait for the outcomes. Returns them by the name of the image."""
    bucket = Bucket(s3_client(settings.s3_endpoint), settings.s3_buckets[0])
    for image in images:
        await asyncio.to_thread(bucket.put, image.name, image.data)
    await streams.submit([Submission(id=image.name, uri=bucket.uri(image.name)) for image in images], settings)
    outcomes: dict[str, Verdict | DeadLetter] = {}
    reader = await open_reader(StreamConfig.from_settings(settings))

    async def collect(stream: str, parse: Callable[[Message], tuple[str | None, Verdict | DeadLetter]]) -> None:
        async for message in reader.read(stream, follow=True):
            submission_id, outcome = parse(message)
            if submission_id is not None:
                outcomes[submission_id] = outcome
                progress(f"{len(outcomes)} of {len(images)} settled")

    collecting = [
        asyncio.create_task(collect(settings.verdicts_stream, _parse_verdict)),
        asyncio.create_task(collect(settings.dead_letters_stream, _parse_dead_letter)),
    ]
    deadline = time.monotonic() + _TIMEOUT_S
    while len(outcomes) < len(images) and time.monotonic() < deadline and not any(task.done() for task in collecting):
        await asyncio.wait(collecting, timeout=0.1)
    for task in collecting:
        task.cancel()
    await asyncio.wait(collecting)
    await reader.close()
    return outcomes


def _parse_verdict(message: Message) -> tuple[str | None, Verdict]:
    verdict = Verdict.model_validate_json(message.value)
    return verdict.submission_id, verdict


def _parse_dead_letter(message: Message) -> tuple[str | None, DeadLetter]:
    letter = DeadLetter.from_headers(message.headers)
    return letter.submission_id, letter


def _make_table(images: list[_DemoImage], outcomes: dict[str, Verdict | DeadLetter]) -> Table:
    table = Table("image", "shows", "action", "rating", "score", "category", "ms", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for image in images:
        row = [image.name, image.shows]
        match outcomes.get(image.name):
            case Verdict() as verdict:
                score = "" if verdict.score is None else f"{verdict.score:.2f}"
                category = verdict.category or verdict.reason or ""
                row += [verdict.action or "", verdict.rating or "", score, category, str(verdict.timings_ms.total)]
            case DeadLetter() as letter:
                row += ["", "", "", f"dead letter: {letter.reason}"]
            case _:
                row += ["", "", "", "not settled"]
        table.add_row(*row)
    return table

"""The one real engine that all tests share, usable from any event loop."""

import asyncio
import io
import random
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from PIL import Image, ImageDraw

from services.core.values import (
    Assessment,
    Detail,
    ImageFacts,
    Policy,
    PolicyIdentity,
    PreparedImage,
    Priority,
    RationaleMode,
    Thresholds,
)
from services.guard.checkpoints import resolve_checkpoint
from services.guard.engine import Engine
from services.guard.inference import GuardInference

T = TypeVar("T")

DEFAULT_PROMPT = (Path(__file__).with_name("default-prompt.txt")).read_text(encoding="utf-8")


class SharedGuard:
    """A guard whose engine lives on an event loop of its own, so that tests on any loop can share it."""

    def __init__(self, guard: GuardInference, loop: asyncio.AbstractEventLoop) -> None:
        self.guard = guard
        self.engine = guard.engine
        self._loop = loop

    @property
    def max_side_px(self) -> int:
        return self.guard.max_side_px

    async def assess(
        self, image: PreparedImage, policy: Policy, detail: Detail, priority: Priority = "live"
    ) -> Assessment:
        return await self.on_loop(assess(self.guard, image, policy, detail, priority))

    async def on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))


async def assess(
    guard: GuardInference, image: PreparedImage, policy: Policy, detail: Detail, priority: Priority = "live"
) -> Assessment:
    """Judge an image under one policy."""
    (assessment,) = await guard.assess_each(image, [policy], detail, priority)
    return assessment


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedGuard]:
    """The tiny checkpoint on the real SGLang: started once, 40 to 90 s, for all tests that judge images."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="guard-engine-loop", daemon=True)
    thread.start()

    def on_loop(work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result()

    started = Engine(
        resolve_checkpoint("tiny"), state_dir=tmp_path_factory.mktemp("state"), start_s=400, probe_every_s=2, hang_s=30
    )
    try:
        on_loop(started.start())
        yield SharedGuard(GuardInference(started, deadline_s=120), loop)
    finally:
        on_loop(started.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def prepared(data: bytes, width: int = 64, height: int = 64) -> PreparedImage:
    """A prepared image with these bytes, whatever they are."""
    facts = ImageFacts(width=width, height=height, format="jpeg")
    return PreparedImage(data, "image/jpeg", width, height, sha256="0" * 64, facts=facts)


def drawn(seed: int) -> PreparedImage:
    """A drawn image, a different one for each seed."""
    draw_from = random.Random(seed)
    width, height = draw_from.randint(120, 360), draw_from.randint(120, 360)

    def colour() -> tuple[int, ...]:
        return tuple(draw_from.randrange(256) for _ in range(3))

    image = Image.new("RGB", (width, height), colour())
    canvas = ImageDraw.Draw(image)
    for _ in range(6):
        left, top = draw_from.randrange(width), draw_from.randrange(height)
        canvas.ellipse((left, top, left + 60, top + 40), fill=colour())
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return prepared(buffer.getvalue(), width, height)


def policy(rationale: RationaleMode = "unsafe", prompt: str = DEFAULT_PROMPT) -> Policy:
    """LlavaGuard's default policy."""
    return Policy(
        identity=PolicyIdentity(name="default", version=1, digest="sha256:0"),
        prompt=prompt,
        thresholds=Thresholds(review=0.5, block=0.9),
        category_thresholds={},
        rationale=rationale,
        effort="full",
        first_look_below=0.05,
    )

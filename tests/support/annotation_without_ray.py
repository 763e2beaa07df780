"""Runs `sluice annotate` in one process, without Ray: with a given guard, and a decoder that accepts a PNG header."""

import asyncio
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from pipelines.annotation import ray_workers, workers
from pipelines.annotation import run as run_module
from services.core.errors import NotAnImage
from services.core.values import ImageFacts, PreparedImage


class FakeDecoderPool:
    def __init__(self, *_: Any) -> None:
        pass

    async def prepare(self, data: bytes) -> PreparedImage:
        if not data.startswith(b"\x89PNG"):
            raise NotAnImage("no PNG")
        facts = ImageFacts(width=8, height=8, format="png")
        return PreparedImage(data, "image/png", 8, 8, hashlib.sha256(data).hexdigest(), facts)


@contextmanager
def _no_cluster(*_: Any) -> Iterator[ray_workers.GuardPool]:
    yield ray_workers.GuardPool("none", 1)


def _run_without_ray(
    worker: type[Any], arguments: Mapping[str, Any], numbers: Sequence[int], _placement: Any = None
) -> Any:
    """The highest number first."""

    async def work(number: int) -> dict[str, Any]:
        result: dict[str, Any] = await worker(**arguments).work(number)
        return result

    for number in sorted(numbers, reverse=True):
        yield asyncio.run(work(number))


def annotate_without_ray(monkeypatch: pytest.MonkeyPatch, make_guard: Callable[[], Any]) -> None:
    """Let `annotate` run in this process, with a guard of `make_guard` for each worker, for the rest of a test."""
    monkeypatch.setattr(ray_workers, "join_cluster", _no_cluster)
    monkeypatch.setattr(ray_workers, "provide_guard", _no_cluster)
    monkeypatch.setattr(ray_workers, "run_on_workers", _run_without_ray)
    monkeypatch.setattr(ray_workers, "run_in_process", _run_without_ray)
    monkeypatch.setattr(workers.ServeGuardClient, "from_settings", lambda *_: make_guard())
    monkeypatch.setattr(workers.serve, "get_deployment_handle", lambda *_: None)
    monkeypatch.setattr(workers, "DecoderPool", FakeDecoderPool)
    monkeypatch.setattr(run_module, "render_page", lambda _: "")  # rendering takes longer than everything else

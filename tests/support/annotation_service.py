"""A Ray cluster with a scripted guard: the digest of an image decides its answer.

python -m tests.support.annotation_service FILE LOG [MS]: writes the cluster's address to FILE when it is ready, a line
with the image's digest to LOG for every assessment, each of which takes MS milliseconds (10), and runs until killed.
"""

import asyncio
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import ray
from ray import serve

from services.core.errors import GuardFailed
from services.core.values import (
    CATEGORIES,
    NO_CATEGORY,
    Assessment,
    Detail,
    GuardPriority,
    ModelIdentity,
    Policy,
    PreparedImage,
)

MODEL = ModelIdentity(name="scripted", revision="sha256:0", engine="none", prompt="sha256:1")


def assessment(sha256: str) -> Assessment:
    """The answer of the scripted guard: one of four images is Unsafe."""
    score = int(sha256[:8], 16) / 0xFFFFFFFF
    if score < 0.75:
        return Assessment(rating="Safe", category=NO_CATEGORY, rationale=None, score=score / 2, model=MODEL)
    category = CATEGORIES[int(sha256[8:10], 16) % len(CATEGORIES)]
    return Assessment(rating="Unsafe", category=category, rationale="shown", score=score, model=MODEL)


@serve.deployment(name="Guard", max_ongoing_requests=100)
class FakeGuard:
    """Refuses images 1 pixel wide."""

    def __init__(self, log: str, pause_s: float) -> None:
        self._pause_s = pause_s
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    async def max_side_px(self) -> int:
        return 384

    async def assess_each(
        self, image: PreparedImage, policies: Sequence[Policy], detail: Detail, priority: GuardPriority = "live"
    ) -> list[Assessment]:
        assert priority == "backfill", "live submissions have priority"
        os.write(self._log, f"{image.sha256}\n".encode())
        if image.facts.width == 1:
            raise GuardFailed("The engine refuses it.")
        await asyncio.sleep(self._pause_s)
        return [assessment(image.sha256) for _ in policies]


def main() -> None:
    pause_s = float(sys.argv[3]) / 1000 if sys.argv[3:] else 0.01
    ray.init("local", num_cpus=2, object_store_memory=100 << 20, include_dashboard=False, logging_level="ERROR")
    serve.start(proxy_location="Disabled")
    # The guard reserves both CPUs, as under `sluice up` on a machine with two.
    guard = FakeGuard.options(ray_actor_options={"num_cpus": 2})  # type: ignore[attr-defined]
    serve.run(guard.bind(sys.argv[2], pause_s), name="sluice", route_prefix=None)
    address = Path(sys.argv[1])
    draft = address.with_suffix(".draft")
    draft.write_text(ray.get_runtime_context().gcs_address)
    draft.rename(address)
    time.sleep(3600)


if __name__ == "__main__":
    main()

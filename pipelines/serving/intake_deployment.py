"""Intake as a Ray Serve deployment: reads the streams, has submissions judged, and publishes their outcomes."""

import os
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from pipelines.autoscaling import recorded_metrics
from pipelines.intake.crash_isolation import CrashIsolation
from pipelines.intake.worker import IntakeWorker
from pipelines.serving.components import Components
from pipelines.serving.names import INTAKE
from services.core.errors import TooLarge, Unjudgeable
from services.core.messages import ImageRequest, Verdict
from services.core.settings import Settings
from services.core.telemetry import configure_logging
from services.core.values import Policy, StoredObject
from services.policies.traffic_sample import TrafficSample
from services.streams.config import StreamConfig
from services.streams.factory import open_consumer


@serve.deployment(name=INTAKE, max_ongoing_requests=100, health_check_period_s=5)
class IntakeDeployment:
    """One replica: one member of the consumer group."""

    async def __init__(self, settings: Settings, side_px: int, guard: DeploymentHandle[Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        """Join the group and start to receive; the guard need not be ready yet.

        `side_px` is the longest side of an image, in pixels, that the model can use.
        """
        configure_logging(settings.log_file)
        self._closing = AsyncExitStack()
        parts = await Components.from_settings(settings, side_px, guard, self._closing)
        self._policies, self._moderator, shared = parts.policies, parts.moderator, parts.shared
        self._guard = parts.guard
        self._image_limit_bytes = settings.image_limit_bytes
        enter = self._closing.enter_async_context
        sample = await enter(TrafficSample(shared, size=settings.sample_size))
        member = f"{os.uname().nodename}-{os.getpid()}-{serve.get_replica_context().replica_id.unique_id}"
        isolation = await enter(CrashIsolation(shared, settings.group, member))
        backfill = (
            await open_consumer(StreamConfig.for_backfill(settings), member) if settings.backfill_stream else None
        )
        live = await open_consumer(StreamConfig.from_settings(settings), member)
        self._intake = IntakeWorker(live, self._moderator, settings, isolation, sample, backfill)
        self._closing.push_async_callback(self._intake.drain)

    async def judge_under(
        self, request: ImageRequest, policies: Sequence[str | Policy], image: bytes | None = None
    ) -> list[Verdict | Unjudgeable]:
        """Judge an image by each policy or policy version. Nothing is published, counted or acted upon.

        `image` is the image file, if it came with the request; None to fetch the object that the request names.

        Raises:
            Unjudgeable: the image is too large, it cannot be fetched or prepared, or a policy version does not exist.
        """
        if image is not None and len(image) > self._image_limit_bytes:
            raise TooLarge(f"the image has {len(image)} bytes, more than {self._image_limit_bytes}")
        upload = None if image is None else StoredObject(image, None, None)
        resolved = [await self._policies.resolve(p) if isinstance(p, str) else p for p in policies]
        return list(await self._moderator.judge_under(request, resolved, upload=upload))

    async def drain(self) -> None:
        """Receive no more, finish what is in flight, leave the group."""
        await self._intake.drain()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what the autoscaling policy reads; see `pipelines.autoscaling.recorded_metrics`."""
        return recorded_metrics.encode(self._intake.lags, self._guard.in_flight)

    def check_health(self) -> None:
        """Raise what made the member stop receiving, if anything did. Serve then replaces the replica."""
        self._intake.check()

    async def __del__(self) -> None:
        await self._closing.aclose()

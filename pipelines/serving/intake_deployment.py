"""Intake as a Ray Serve deployment: one member of the consumer group and its streams."""

import os
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from pipelines.autoscaling import recorded_metrics
from pipelines.intake.crash_isolation import CrashIsolation
from pipelines.intake.replayed_attempts import ReplayedAttempts
from pipelines.intake.worker import IntakeWorker
from pipelines.serving.components import Components
from pipelines.serving.names import INTAKE
from pipelines.serving.replica_process import protect_replica
from services.core.errors import TooLarge, Unjudgeable
from services.core.logs import configure_logging
from services.core.messages import ImageRequest, Verdict
from services.core.settings import Settings
from services.core.tasks import close_on_error
from services.core.values import Policy, StoredObject
from services.policies.traffic_sample import TrafficSample
from services.streams.config import StreamConfig
from services.streams.factory import open_consumer


@serve.deployment(name=INTAKE, max_ongoing_requests=100, health_check_period_s=5)
class IntakeDeployment:
    """One replica: one member of the consumer group. It also judges single images for the command line."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, max_side_px: int, guard: DeploymentHandle[Any]
    ) -> None:
        """Join the consumer group and start to receive. The guard need not be ready yet.

        `max_side_px` is the longest side of an image, in pixels, that the model can use.

        Raises:
            ConfigurationError: the stream system refuses the settings.
        """
        configure_logging(settings.log_file)
        protect_replica()
        self._closing = AsyncExitStack()
        async with close_on_error(self._closing):
            await self._start(settings, max_side_px, guard)

    async def _start(self, settings: Settings, max_side_px: int, guard: DeploymentHandle[Any]) -> None:
        components = await Components.start(settings, max_side_px, guard, self._closing)
        self._guard, self._policies, self._moderator = components.guard, components.policies, components.moderator
        self._image_limit_bytes = settings.image_limit_bytes
        enter = self._closing.enter_async_context
        sample = await enter(TrafficSample(components.redis_cache, size=settings.sample_size))
        member = f"{os.uname().nodename}-{os.getpid()}-{serve.get_replica_context().replica_id.unique_id}"
        isolation = await enter(CrashIsolation(components.redis_cache, settings.group, member))
        backfill = (
            await open_consumer(StreamConfig.for_backfill(settings), member) if settings.backfill_stream else None
        )
        live = await open_consumer(StreamConfig.from_settings(settings), member)
        replayed_attempts = ReplayedAttempts(components.redis_cache, settings.dead_letters_stream)
        self._worker = IntakeWorker(live, self._moderator, settings, isolation, sample, backfill, replayed_attempts)
        self._closing.push_async_callback(self._worker.drain)

    async def judge_under(
        self, request: ImageRequest, policies: Sequence[str | Policy], image: bytes | None = None
    ) -> list[Verdict | Unjudgeable]:
        """Judge an image by each policy or policy version.

        No verdict is published, and no metric of submissions or actions counts the image.

        `image` is the image file, if it came with the request. With None, the object that the request names is fetched.

        Raises:
            Unjudgeable: the image is too large, it cannot be fetched or prepared, or a policy version does not exist.
        """
        if image is not None and len(image) > self._image_limit_bytes:
            raise TooLarge(f"the image has {len(image)} bytes, more than {self._image_limit_bytes}")
        upload = None if image is None else StoredObject(image, None, None)
        resolved = [await self._policies.resolve(p) if isinstance(p, str) else p for p in policies]
        return list(await self._moderator.judge_under(request, resolved, upload=upload))

    async def drain(self) -> None:
        """Receive no more messages, finish those in flight, and leave the group."""
        await self._worker.drain()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the numbers that the autoscaling policy reads; see `pipelines.autoscaling.recorded_metrics`."""
        return recorded_metrics.encode(self._worker.lags, self._guard.in_flight)

    def check_health(self) -> None:
        """
        Raises:
            Exception: the error that made the worker stop receiving. Serve replaces the replica.
        """
        self._worker.check_health()

    async def __del__(self) -> None:
        await self._closing.aclose()

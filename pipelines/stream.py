"""The Serve application: Intake, which works the stream, and Guard, which judges.

Application name `sluice`, deployments `Intake` (the ingress) and `Guard`. Guard runs a fixed number of replicas.
"""

import os
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any, Final

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from pipelines.intake import Intake
from pipelines.quarantine import Quarantine
from services.contracts import Policy, Submission, Verdict
from services.errors import Unjudgeable
from services.guard.checkpoints import resolve
from services.guard.deployment import GuardDeployment, RemoteGuard
from services.images.prepare import Preparer
from services.images.store import ObjectStore
from services.moderation import Moderation
from services.policies.breaker import CircuitBreaker
from services.policies.cache import PolicyCache
from services.policies.registry import PolicyRegistry
from services.policies.sample import Sample
from services.policies.shared import SharedCopies
from services.settings import Settings
from services.streams.connect import open_transport
from services.telemetry import configure_logging

APPLICATION: Final = "sluice"
_GUARD_PATIENCE: Final = 4
"""Deadlines of the guard that a call may take, waiting for a replica included."""
_STOP_S: Final = 10.0
"""What a replica gets beyond the drain to close its connections and children."""


@serve.deployment(name="Intake", max_ongoing_requests=100, health_check_period_s=5)
class IntakeDeployment:
    """One replica: one member of the consumer group."""

    async def __init__(self, settings: Settings, side_px: int, guard: DeploymentHandle[Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        """Join the group and start to receive; the guard need not be ready yet. `side_px`: what the model can use."""
        configure_logging(settings.log_file)
        self._closing = AsyncExitStack()
        preparer, store = Preparer(settings, side_px), ObjectStore(settings)
        self._closing.callback(preparer.close)
        self._closing.callback(store.close)
        bucket = PolicyRegistry.from_settings(settings)
        shared = SharedCopies(settings.redis_url, settings.policy_bucket)
        self._closing.push_async_callback(shared.close)
        enter = self._closing.enter_async_context
        self._policies = await enter(PolicyCache(bucket, shared, refresh_s=settings.policy_refresh_s))
        self._moderation = Moderation(
            policies=self._policies,
            images=store,
            preparer=preparer,
            guard=RemoteGuard(guard, deadline_s=_GUARD_PATIENCE * settings.guard_deadline_s),
            breaker=await enter(CircuitBreaker(self._policies, bucket, shared)),
        )
        sample = await enter(Sample(shared, size=settings.sample_size))
        member = f"{os.uname().nodename}-{os.getpid()}-{serve.get_replica_context().replica_id.unique_id}"
        quarantine = await enter(Quarantine(shared, settings.group, member))
        backfill = await open_transport(backfill_settings(settings), member) if settings.backfill_stream else None
        live = await open_transport(settings, member)
        self._intake = Intake(live, self._moderation, settings, quarantine, sample, backfill)
        self._closing.push_async_callback(self._intake.drain)

    async def judge_under(
        self, submission: Submission, policies: Sequence[str | Policy]
    ) -> list[Verdict | Unjudgeable]:
        """What policies, or versions by reference, make of a submission. Nothing is published, counted or acted upon.

        Raises:
            Unjudgeable: the image cannot be had or prepared, or a reference is of no version.
        """
        resolved = [await self._policies.resolve(p) if isinstance(p, str) else p for p in policies]
        return list(await self._moderation.judge_under(submission, resolved))

    async def drain(self) -> None:
        """Receive no more, finish what is in flight, leave the group."""
        await self._intake.drain()

    def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        self._intake.check()

    async def __del__(self) -> None:
        await self._closing.aclose()


def backfill_settings(settings: Settings) -> Settings:
    """Those of the stream of backfill, which has a group of its own."""
    return settings.model_copy(
        update={"submissions_stream": settings.backfill_stream, "group": f"{settings.group}.backfill"}
    )


def application(settings: Settings, *, guard_gpus: float) -> Application:
    """The whole application, for `serve.run`.

    Raises:
        ConfigurationError: SLUICE_MODEL names no checkpoint.
    """
    guard = GuardDeployment.options(  # type: ignore[attr-defined]  # the decorator makes a Deployment of it
        num_replicas=settings.guard_replicas,
        max_ongoing_requests=2 * settings.guard_in_flight,  # the next ones are at hand when a place is free
        ray_actor_options={"num_cpus": 1, "num_gpus": guard_gpus},
        graceful_shutdown_timeout_s=_STOP_S,
    ).bind(settings)
    intake: Application = IntakeDeployment.options(  # type: ignore[attr-defined]
        num_replicas=settings.intake_replicas,
        ray_actor_options={"num_cpus": 1},
        graceful_shutdown_timeout_s=settings.drain_s + _STOP_S,
    ).bind(settings, resolve(settings.model).max_side_px, guard)
    return intake

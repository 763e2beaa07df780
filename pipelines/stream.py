"""The Serve application: Intake, which works the stream, and Guard, which judges.

Application name `sluice`, deployments `Intake` (the ingress) and `Guard`. Guard runs a fixed number of replicas.
"""

import os
from contextlib import AsyncExitStack
from typing import Any, Final

import boto3
from botocore.config import Config
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from pipelines.intake import Intake
from services.guard.checkpoints import resolve
from services.guard.deployment import GuardDeployment, RemoteGuard
from services.images.prepare import Preparer
from services.images.store import ObjectStore
from services.moderation import Moderation
from services.policies.cache import PolicyCache
from services.policies.registry import PolicyRegistry
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
        moderation = Moderation(
            policies=PolicyCache(registry(settings)),
            images=store,
            preparer=preparer,
            guard=RemoteGuard(guard, deadline_s=_GUARD_PATIENCE * settings.guard_deadline_s),
        )
        member = f"{os.uname().nodename}-{os.getpid()}-{serve.get_replica_context().replica_id.unique_id}"
        self._intake = Intake(await open_transport(settings, member), moderation, settings)
        self._closing.push_async_callback(self._intake.drain)

    async def drain(self) -> None:
        """Receive no more, finish what is in flight, leave the group."""
        await self._intake.drain()

    def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        self._intake.check()

    async def __del__(self) -> None:
        await self._closing.aclose()


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


def registry(settings: Settings) -> PolicyRegistry:
    """The policy bucket of these settings."""
    options: dict[str, Any] = {"s3": {"addressing_style": "path"}} if settings.s3_endpoint else {}
    config = Config(connect_timeout=5, read_timeout=10, retries={"mode": "standard", "max_attempts": 3}, **options)
    s3 = boto3.client("s3", endpoint_url=settings.s3_endpoint, config=config)
    return PolicyRegistry(s3, settings.policy_bucket)

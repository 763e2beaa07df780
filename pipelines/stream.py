"""The Serve application: Intake, which works the stream, and Guard, which judges.

Application name `sluice`, deployments `Intake` (the ingress) and `Guard`. Guard runs a fixed number of replicas.
"""

import asyncio
import os
from typing import Any, Final

import boto3
from botocore.config import Config
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from pipelines.intake import Intake
from services.guard.deployment import GuardDeployment, RemoteGuard
from services.images.prepare import Preparer
from services.images.store import ObjectStore
from services.moderation import Moderation
from services.policies.cache import PolicyCache
from services.policies.registry import PolicyRegistry
from services.settings import Settings
from services.streams.connect import open_transport

APPLICATION: Final = "sluice"
_STOP_S: Final = 10.0
"""What a replica gets beyond the drain to close its connections and children."""


@serve.deployment(name="Intake", max_ongoing_requests=100, health_check_period_s=5)
class IntakeDeployment:
    """One replica: one member of the consumer group."""

    async def __init__(self, settings: Settings, guard: DeploymentHandle) -> None:
        """Join the group and start to receive; the guard need not be ready yet."""
        remote = RemoteGuard(guard)
        self._preparer = Preparer(settings, remote.max_side_px)
        self._store = ObjectStore(settings)
        moderation = Moderation(
            policies=PolicyCache(registry(settings)), images=self._store, preparer=self._preparer, guard=remote
        )
        member = f"{os.uname().nodename}-{os.getpid()}-{serve.get_replica_context().replica_id.unique_id}"
        self._intake = Intake(await open_transport(settings, member), moderation, settings)

    async def drain(self) -> None:
        """Receive no more, finish what is in flight, leave the group."""
        await self._intake.drain()

    def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        self._intake.check()

    async def __del__(self) -> None:
        await self._intake.drain()
        await asyncio.to_thread(self._preparer.close)
        self._store.close()


def application(settings: Settings, *, guard_gpus: float) -> Application:
    """The whole application, for `serve.run`."""
    grace_s = settings.drain_s + _STOP_S
    guard = GuardDeployment.options(  # type: ignore[attr-defined]
        name="Guard",
        num_replicas=settings.guard_replicas,
        ray_actor_options={"num_cpus": 1, "num_gpus": guard_gpus},
        graceful_shutdown_timeout_s=_STOP_S,
    ).bind(settings)
    intake: Application = IntakeDeployment.options(  # type: ignore[attr-defined]
        num_replicas=settings.intake_replicas,
        ray_actor_options={"num_cpus": 1},
        graceful_shutdown_timeout_s=grace_s,
    ).bind(settings, guard)
    return intake


def registry(settings: Settings) -> PolicyRegistry:
    """The policy bucket of these settings."""
    options: dict[str, Any] = {"s3": {"addressing_style": "path"}} if settings.s3_endpoint else {}
    config = Config(connect_timeout=5, read_timeout=10, retries={"mode": "standard", "max_attempts": 3}, **options)
    s3 = boto3.client("s3", endpoint_url=settings.s3_endpoint, config=config)
    return PolicyRegistry(s3, settings.policy_bucket)

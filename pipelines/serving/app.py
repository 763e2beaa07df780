"""The Serve application: Intake, which works the stream, Guard, which judges, and Gateway, which answers over HTTP.

Application name `sluice`, deployments `Gateway` (the ingress; there may be none), `Intake` and `Guard`. The replicas
of the last two follow the backlog where the settings say so; see `pipelines.autoscaling.serve_config`.
"""

import os
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any, Final

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from pipelines.autoscaling import serve_config as elastic
from pipelines.intake.crash_isolation import CrashIsolation
from pipelines.intake.worker import Intake
from pipelines.serving.components import Assembly
from pipelines.serving.gateway_deployment import GatewayDeployment
from pipelines.serving.guard_deployment import GuardDeployment
from services.core.errors import Unjudgeable
from services.core.messages import Submission, Verdict
from services.core.settings import Settings
from services.core.telemetry import configure_logging
from services.core.values import Policy
from services.guard.checkpoints import resolve
from services.policies.traffic_sample import TrafficSample
from services.streams.factory import open_consumer

APPLICATION: Final = "sluice"
INTAKE: Final = "Intake"
_STOP_S: Final = 10.0
"""What a replica gets beyond the drain to close its connections and children."""


@serve.deployment(name=INTAKE, max_ongoing_requests=100, health_check_period_s=5)
class IntakeDeployment:
    """One replica: one member of the consumer group."""

    async def __init__(self, settings: Settings, side_px: int, guard: DeploymentHandle[Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        """Join the group and start to receive; the guard need not be ready yet. `side_px`: what the model can use."""
        configure_logging(settings.log_file)
        self._closing = AsyncExitStack()
        parts = await Assembly.from_settings(settings, side_px, guard, self._closing)
        self._policies, self._moderation, shared = parts.policies, parts.moderation, parts.shared
        self._guard = parts.guard
        enter = self._closing.enter_async_context
        sample = await enter(TrafficSample(shared, size=settings.sample_size))
        member = f"{os.uname().nodename}-{os.getpid()}-{serve.get_replica_context().replica_id.unique_id}"
        isolation = await enter(CrashIsolation(shared, settings.group, member))
        backfill = await open_consumer(backfill_settings(settings), member) if settings.backfill_stream else None
        live = await open_consumer(settings, member)
        self._intake = Intake(live, self._moderation, settings, isolation, sample, backfill)
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

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the number of replicas is decided by; see `pipelines.autoscaling.serve_policy`."""
        return elastic.report(self._intake.lags, self._guard.in_flight)

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


def application(settings: Settings, *, guard_gpus: float, guard: Any = GuardDeployment) -> Application:
    """The whole application, for `serve.run`. `guard`: the deployment that judges.

    Raises:
        ConfigurationError: SLUICE_MODEL names no checkpoint.
    """
    side_px = resolve(settings.model).max_side_px
    guard = guard.options(
        **elastic.guard_replicas(settings),
        max_ongoing_requests=_guard_calls(settings),
        ray_actor_options={"num_cpus": 1, "num_gpus": guard_gpus},
        graceful_shutdown_timeout_s=settings.drain_s + _STOP_S,
    ).bind(settings)
    intake: Application = IntakeDeployment.options(  # type: ignore[attr-defined]
        **elastic.intake_replicas(settings),
        graceful_shutdown_timeout_s=settings.drain_s + _STOP_S,
    ).bind(settings, side_px, guard)
    if not settings.gateway_replicas:
        return intake
    gateway: Application = GatewayDeployment.options(  # type: ignore[attr-defined]
        **elastic.gateway_replicas(settings),
        graceful_shutdown_timeout_s=settings.drain_s + _STOP_S,
    ).bind(settings, side_px, guard, intake)
    return gateway


def _guard_calls(settings: Settings) -> int:
    """Calls that a guard replica takes at a time: those that wait in it go by priority, those that wait for it do not.

    So all that Intake has in flight fits, and Gateway's calls on top: whoever waits for an answer is never behind it.
    Where replicas follow the backlog, Intake has hardly more members than feed the guard, and its fewest on top.
    """
    of_intake = 2 * settings.guard_in_flight + settings.intake_replicas * settings.in_flight
    return of_intake + settings.gateway_replicas * settings.gateway_in_flight

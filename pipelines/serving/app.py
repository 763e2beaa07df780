"""The Serve application: its deployments Gateway (HTTP), Intake (streams) and Guard (the model), bound together.

Gateway is the ingress. Without gateway replicas, Intake is the ingress. With autoscaling, the replicas of Intake and
Guard follow the backlog; see `pipelines.autoscaling.serve_config`.
"""

from typing import Any, Final

from ray.serve import Application

from pipelines.autoscaling import serve_config
from pipelines.serving.gateway_deployment import GatewayDeployment
from pipelines.serving.guard_deployment import GuardDeployment
from pipelines.serving.intake_deployment import IntakeDeployment
from services.core.settings import Settings
from services.guard.checkpoints import assume_in_flight, resolve_checkpoint

_CLOSE_S: Final = 10.0
"""Time that a replica has after the drain to close its connections and child processes."""


def bind_application(settings: Settings, *, guard_gpus: float, guard: Any = GuardDeployment) -> Application:
    """Return the application for `serve.run`. `guard` is the deployment that judges; tests pass another one.

    Raises:
        ConfigurationError: SLUICE_MODEL names no checkpoint.
    """
    # Intake and Gateway start while no guard runs, on nodes that need not have the checkpoint, so they can neither ask
    # the guard for this number nor look it up.
    max_side_px = resolve_checkpoint(settings.model).max_side_px
    shutdown_s = settings.drain_s + _CLOSE_S
    guard = guard.options(
        **serve_config.guard_options(settings),
        max_ongoing_requests=_max_guard_calls(settings),
        ray_actor_options={"num_cpus": 1, "num_gpus": guard_gpus},
        graceful_shutdown_timeout_s=shutdown_s,
    ).bind(settings)
    intake: Application = IntakeDeployment.options(  # type: ignore[attr-defined]
        **serve_config.intake_options(settings), graceful_shutdown_timeout_s=shutdown_s
    ).bind(settings, max_side_px, guard)
    if not settings.gateway_replicas:
        return intake
    gateway: Application = GatewayDeployment.options(  # type: ignore[attr-defined]
        **serve_config.gateway_options(settings), graceful_shutdown_timeout_s=shutdown_s
    ).bind(settings, max_side_px, guard, intake)
    return gateway


_READINESS_CALLS: Final = 1
"""Calls that the readiness of one gateway has in flight, beside those for requests."""


def _max_guard_calls(settings: Settings) -> int:
    """Return the limit of calls that a guard replica accepts at a time.

    Calls that wait inside the replica are ordered by priority; calls that wait for the replica are not. So the limit
    has room for everything that Intake has in flight, and for the calls of Gateway on top: an HTTP request never waits
    behind the stream. With autoscaling, Intake has hardly more members than the guard needs, so its minimum is enough.
    """
    intake_calls = 2 * assume_in_flight(settings) + settings.intake_replicas * settings.in_flight
    return intake_calls + settings.gateway_replicas * (settings.gateway_in_flight + _READINESS_CALLS)

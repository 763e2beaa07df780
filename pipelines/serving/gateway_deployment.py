"""The gateway as a Ray Serve deployment: the ingress of the application, with an HTTP server of its own.

Serve's proxy is not used (docs/decisions): clients connect to the replicas.
"""

import gc
from contextlib import AsyncExitStack
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from pipelines.autoscaling import recorded_metrics
from pipelines.serving.components import Components
from pipelines.serving.names import GATEWAY
from services.core.errors import GuardUnavailable
from services.core.settings import Settings
from services.core.telemetry import configure_logging
from services.gateway.api_keys import ApiKeyRegistry
from services.gateway.app import Dependencies, create_app
from services.gateway.server import GatewayServer, listen


@serve.deployment(name=GATEWAY, max_ongoing_requests=100, health_check_period_s=5)
class GatewayDeployment:
    """One replica: one HTTP server on the gateway's port, which the replicas of one machine share."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        settings: Settings,
        side_px: int,
        guard: DeploymentHandle[Any],
        intake: DeploymentHandle[Any],
    ) -> None:
        """Listen; the guard need not be ready yet.

        `intake` is not called: Serve deploys what the ingress is bound to, so the argument makes Intake a part of the
        application. `side_px` is the longest side of an image, in pixels, that the model can use.

        Raises:
            ConfigurationError: the port is in use or not allowed.
        """
        configure_logging(settings.log_file)
        self._closing = AsyncExitStack()
        parts = await Components.from_settings(settings, side_px, guard, self._closing)
        app = create_app(
            Dependencies(
                moderator=parts.moderator,
                guard=parts.guard,
                preparer=parts.preparer,
                policies=parts.policies,
                registry=parts.registry,
                redis_cache=parts.shared,
                keys=ApiKeyRegistry.from_settings(settings),
            ),
            settings,
        )
        self._guard = parts.guard
        self._readiness = app.state.readiness
        listener = listen(settings.gateway_host, settings.gateway_port)
        self._server = GatewayServer(app, settings, listener=listener)
        self._closing.push_async_callback(self._server.stop)
        await self._server.start()
        # Objects made until now live as long as the replica. Without this, each full collection would scan them, and
        # delay all requests meanwhile.
        gc.collect()
        gc.freeze()

    async def not_ready_reason(self) -> str:
        """Return why the gateway cannot answer requests yet; empty when it can."""
        return str(self._readiness.not_ready_reason)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what the autoscaling policy reads; see `pipelines.autoscaling.recorded_metrics`."""
        return recorded_metrics.encode({}, self._guard.in_flight)

    async def drain(self) -> None:
        """Accept no more requests, and finish those in progress."""
        await self._server.stop()

    def check_health(self) -> None:
        """
        Raises:
            GuardUnavailable: the HTTP server has ended. Serve then replaces the replica.
        """
        if not self._server.is_serving:
            raise GuardUnavailable("The gateway's HTTP server has ended.")

    async def __del__(self) -> None:
        await self._closing.aclose()

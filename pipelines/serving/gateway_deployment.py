"""The gateway as a Ray Serve deployment: the ingress of the application, with an HTTP server of its own.

Clients connect to the replicas and not to Serve's proxy. Decision 12 in docs/decisions/README.md gives the reasons.
"""

import gc
from contextlib import AsyncExitStack
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from pipelines.autoscaling import recorded_metrics
from pipelines.serving.components import Components
from pipelines.serving.names import GATEWAY
from pipelines.serving.replica_process import protect_replica
from services.core.logs import configure_logging
from services.core.settings import Settings
from services.core.tasks import close_on_error
from services.gateway.api_keys import ApiKeyRegistry
from services.gateway.app import GatewayDependencies, create_app
from services.gateway.server import GatewayServer, listen


@serve.deployment(name=GATEWAY, max_ongoing_requests=100, health_check_period_s=5)
class GatewayDeployment:
    """One replica: one HTTP server. The replicas of one machine share the gateway's port."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, max_side_px: int, guard: DeploymentHandle[Any], intake: DeploymentHandle[Any]
    ) -> None:
        """Start the HTTP server. The guard need not be ready yet.

        `max_side_px` is the longest side of an image, in pixels, that the model can use. `intake` is not called: Serve
        deploys what the ingress is bound to, so the argument makes Intake a part of the application.

        Raises:
            ConfigurationError: the port is in use or not allowed.
        """
        configure_logging(settings.log_file)
        protect_replica()
        self._closing = AsyncExitStack()
        async with close_on_error(self._closing):
            await self._start(settings, max_side_px, guard)

    async def _start(self, settings: Settings, max_side_px: int, guard: DeploymentHandle[Any]) -> None:
        components = await Components.start(settings, max_side_px, guard, self._closing)
        self._guard = components.guard
        app = create_app(
            GatewayDependencies(
                moderator=components.moderator,
                guard=components.guard,
                preparer=components.decoder_pool,
                policies=components.policies,
                registry=components.registry,
                redis_cache=components.redis_cache,
                keys=ApiKeyRegistry.from_settings(settings),
            ),
            settings,
        )
        self._readiness = app.state.readiness
        listener = listen(settings.gateway_host, settings.gateway_port)
        self._server = GatewayServer(app, settings, listener=listener)
        self._closing.push_async_callback(self._server.stop)
        await self._server.start()
        # The objects made until now live as long as the replica. Without this, each full collection would scan them
        # and delay all requests.
        gc.collect()
        gc.freeze()

    async def not_ready_reason(self) -> str:
        """Return why the gateway cannot answer requests yet; empty when it can."""
        return str(self._readiness.not_ready_reason)

    async def drain(self) -> None:
        """Accept no more requests, and finish those in progress."""
        await self._server.stop()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the numbers that the autoscaling policy reads; see `pipelines.autoscaling.recorded_metrics`."""
        return recorded_metrics.encode({}, self._guard.in_flight)

    def check_health(self) -> None:
        """
        Raises:
            RuntimeError: the HTTP server has stopped. Serve replaces the replica.
        """
        if not self._server.is_serving:
            raise RuntimeError("The gateway's HTTP server has stopped; the replica is replaced.")

    async def __del__(self) -> None:
        await self._closing.aclose()

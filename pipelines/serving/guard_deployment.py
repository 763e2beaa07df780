"""The guard as a Ray Serve deployment: one engine and the model on it."""

from collections.abc import Mapping, Sequence
from typing import Any

from ray import serve

from pipelines.serving.names import GUARD
from services.core.errors import ConfigurationError, GuardUnavailable
from services.core.settings import Settings
from services.core.telemetry import configure_logging
from services.core.values import Assessment, Detail, GuardPriority, Policy, PreparedImage
from services.guard.engine import Engine
from services.guard.inference import GuardInference

_ADJUSTABLE = frozenset({"guard_in_flight", "guard_deadline_s"})


@serve.deployment(name=GUARD, health_check_period_s=10, health_check_timeout_s=30)
class GuardDeployment:
    """One replica: an engine of its own, and the guard on it.

    The constructor returns when the engine has judged an image, so a replica that Serve calls running is ready. The
    engine replaces its server by itself; the replica reports itself unhealthy, and is replaced, only when that has
    not helped for as long as a start may take.
    """

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        """
        Raises:
            ConfigurationError: SLUICE_MODEL names no checkpoint, its weights cannot be had, or it cannot be asked.
            GuardUnavailable: the engine did not start.
        """
        configure_logging(settings.log_file)
        self._settings = settings
        self._engine = Engine.from_settings(settings)
        self._guard = GuardInference.from_settings(self._engine, settings)
        await self._engine.start()
        try:
            await self._guard.check()
        except BaseException:
            await self._engine.stop()
            raise

    async def assess(
        self, image: PreparedImage, policy: Policy, detail: Detail, priority: GuardPriority = "live"
    ) -> Assessment:
        """As `GuardInference.assess`."""
        return await self._guard.assess(image, policy, detail, priority)

    async def assess_each(
        self, image: PreparedImage, policies: Sequence[Policy], detail: Detail, priority: GuardPriority = "live"
    ) -> list[Assessment]:
        """As `GuardInference.assess_each`."""
        return await self._guard.assess_each(image, policies, detail, priority)

    async def max_side_px(self) -> int:
        """Longest side of an image, in pixels, beyond which the checkpoint sees nothing more."""
        return self._guard.max_side_px

    def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Change `guard_in_flight` or `guard_deadline_s` without a new engine; calls in flight keep the old ones.

        Raises:
            ConfigurationError: anything else is to be changed.
        """
        if unknown := config.keys() - _ADJUSTABLE:
            raise ConfigurationError(f"The guard cannot change {', '.join(sorted(unknown))} while it runs.")
        self._settings = self._settings.model_copy(update=dict(config))
        self._guard = GuardInference.from_settings(self._engine, self._settings)

    async def check_health(self) -> None:
        """
        Raises:
            GuardUnavailable: the engine has been down for longer than a start may take. Serve replaces the replica.
        """
        if self._engine.down_s > self._settings.guard_start_s:
            raise GuardUnavailable(f"The engine has been {self._engine.state} for {self._engine.down_s:.0f} s.")

    async def __del__(self) -> None:
        await self._engine.stop()

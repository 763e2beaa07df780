"""The guard as a Ray Serve deployment: one engine and the model on it."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, Final

from ray import serve

from pipelines.serving.names import GUARD
from pipelines.serving.replica_process import protect_replica
from services.core.errors import ConfigurationError, GuardUnavailable
from services.core.logs import configure_logging
from services.core.settings import Settings
from services.core.tasks import close_on_error
from services.core.values import Assessment, Detail, GuardPriority, Policy, PreparedImage
from services.guard.engine import Engine
from services.guard.inference import GuardInference
from services.guard.preflight import read_machine, require_gpu_machine

_ADJUSTABLE_SETTINGS: Final = frozenset({"guard_in_flight", "guard_deadline_s"})


@serve.deployment(name=GUARD, health_check_period_s=10, health_check_timeout_s=30)
class GuardDeployment:
    """One replica: one engine of its own.

    The engine replaces its server by itself. The replica reports itself unhealthy, and is replaced, only if the engine
    stays down for longer than a start may take.
    """

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        """Start the engine and wait until it has judged an image, so a running replica is ready.

        Raises:
            ConfigurationError: SLUICE_MODEL names no checkpoint, its weights are not available, or its tokenizer, its
                config and its weights do not fit together.
            GuardUnavailable: the engine did not start.
        """
        configure_logging(settings.log_file)
        protect_replica()
        self._closing = AsyncExitStack()
        async with close_on_error(self._closing):
            await self._start(settings)

    async def _start(self, settings: Settings) -> None:
        self._settings = settings
        if settings.guard_gpus != 0:
            require_gpu_machine(await asyncio.to_thread(read_machine))
        self._engine = Engine.from_settings(settings)
        await self._closing.enter_async_context(self._engine)
        self._inference = GuardInference.from_settings(self._engine, settings)
        await self._inference.check()

    async def assess_each(
        self, image: PreparedImage, policies: Sequence[Policy], detail: Detail, priority: GuardPriority = "live"
    ) -> list[Assessment]:
        """Judge an image by each policy. See `GuardInference.assess_each`."""
        return await self._inference.assess_each(image, policies, detail, priority)

    async def max_side_px(self) -> int:
        """Return the longest side of an image, in pixels, beyond which the checkpoint sees nothing more."""
        return self._inference.max_side_px

    def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Change `guard_in_flight` or `guard_deadline_s` without a new engine. Calls in flight keep the old values.

        Serve calls this with the deployment's `user_config`, if it has one.

        Raises:
            ConfigurationError: `config` has any other key.
        """
        if unknown := config.keys() - _ADJUSTABLE_SETTINGS:
            raise ConfigurationError(
                f"user_config cannot change {', '.join(sorted(unknown))} of a running guard; change the settings"
            )
        self._settings = self._settings.model_copy(update=dict(config))
        self._inference = GuardInference.from_settings(self._engine, self._settings)

    def check_health(self) -> None:
        """
        Raises:
            GuardUnavailable: the engine has been down for longer than a start may take. Serve replaces the replica.
        """
        if self._engine.down_s > self._settings.guard_start_s:
            raise GuardUnavailable(
                f"The engine has been {self._engine.state} for {self._engine.down_s:.0f} s; the replica is replaced."
            )

    async def __del__(self) -> None:
        await self._closing.aclose()

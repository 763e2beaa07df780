"""The guard as a Ray Serve deployment, and what its callers hold instead of it."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from services.core.errors import ConfigurationError, GuardUnavailable, SluiceError
from services.core.settings import Settings
from services.core.telemetry import configure_logging
from services.core.values import Assessment, Detail, GuardPriority, Policy, PreparedImage
from services.guard.engine import Engine
from services.guard.inference import GuardInference

_ADJUSTABLE = frozenset({"guard_in_flight", "guard_deadline_s"})


@serve.deployment(name="Guard", health_check_period_s=10, health_check_timeout_s=30)
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
            GuardUnavailable: the engine has been away for longer than a start may take.
        """
        if self._engine.down_s > self._settings.guard_start_s:
            raise GuardUnavailable(f"The engine has been {self._engine.state} for {self._engine.down_s:.0f} s.")

    async def __del__(self) -> None:
        await self._engine.stop()


class RemoteGuard:
    """A guard behind a Serve handle: assesses and raises as `GuardInference` does."""

    def __init__(self, handle: DeploymentHandle[Any], *, deadline_s: float) -> None:
        """`deadline_s` holds for one call, waiting for a replica included; it is longer than the guard's own."""
        self._handle = handle
        self._deadline_s = deadline_s
        self.in_flight = 0
        """Calls that have no answer yet, also those that wait for a replica."""

    async def assess(
        self, image: PreparedImage, policy: Policy, detail: Detail, priority: GuardPriority = "live"
    ) -> Assessment:
        """As `GuardInference.assess`; a replica that dies meanwhile, or none to be had, is GuardUnavailable."""
        assessment: Assessment = await self._call("assess", image, policy, detail, priority)
        return assessment

    async def assess_each(
        self, image: PreparedImage, policies: Sequence[Policy], detail: Detail, priority: GuardPriority = "live"
    ) -> list[Assessment]:
        """As `GuardInference.assess_each`, on one replica; raises as `assess`. The deadline holds for each policy."""
        if not policies:
            return []
        assessments: list[Assessment] = await self._call(
            "assess_each", image, policies, detail, priority, calls=len(policies)
        )
        return assessments

    async def max_side_px(self) -> int:
        """Longest side of an image, in pixels, beyond which the checkpoint sees nothing more."""
        return int(await self._call("max_side_px"))

    async def _call(self, method: str, *args: Any, calls: int = 1) -> Any:
        response = getattr(self._handle, method).remote(*args)
        deadline_s = self._deadline_s * calls
        self.in_flight += 1
        try:
            async with asyncio.timeout(deadline_s):
                return await response
        except RayTaskError as error:
            # Serve's error is also an instance of its cause's class, but its text is a traceback.
            if isinstance(error.cause, SluiceError):
                raise error.cause from None
            raise
        except (RayActorError, RayServeException) as error:
            raise GuardUnavailable(f"The guard's replica is away ({type(error).__name__}).") from None
        except TimeoutError:
            response.cancel()
            raise GuardUnavailable(f"No guard answered within {deadline_s:.0f} s.") from None
        except asyncio.CancelledError:
            response.cancel()
            raise
        finally:
            self.in_flight -= 1

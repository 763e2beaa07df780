"""The client of the guard deployment: it calls a Serve handle and raises Sluice's own errors."""

import asyncio
from collections.abc import Sequence
from typing import Any, Final, Self

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from services.core.errors import GuardUnavailable, SluiceError
from services.core.settings import Settings
from services.core.values import Assessment, Detail, GuardPriority, Policy, PreparedImage

_DEADLINES_PER_CALL: Final = 4
"""A call may take this many times the guard's own deadline, because it may have to wait for a replica."""


class ServeGuardClient:
    """The guard behind a Serve handle. Its methods raise the errors of `GuardInference`."""

    def __init__(self, handle: DeploymentHandle[Any], *, deadline_s: float) -> None:
        """`deadline_s` is the longest time of a call, including the wait for a replica."""
        self._handle = handle
        self._deadline_s = deadline_s
        self.in_flight = 0
        """Calls without an answer yet, including those that wait for a replica."""

    @classmethod
    def from_settings(cls, handle: DeploymentHandle[Any], settings: Settings) -> Self:
        return cls(handle, deadline_s=_DEADLINES_PER_CALL * settings.guard_deadline_s)

    async def assess_each(
        self, image: PreparedImage, policies: Sequence[Policy], detail: Detail, priority: GuardPriority = "live"
    ) -> list[Assessment]:
        """Judge an image by each policy, on one replica. The deadline is that of one call for each policy.

        Raises:
            GuardUnavailable: no replica answered within the deadline, or the replica died during the call.
            SluiceError: any error of `GuardInference.assess_each`.
        """
        if not policies:
            return []
        assessments: list[Assessment] = await self._call(
            "assess_each", image, policies, detail, priority, calls=len(policies)
        )
        return assessments

    async def max_side_px(self) -> int:
        """Return the longest side of an image, in pixels, beyond which the checkpoint sees nothing more."""
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
            raise GuardUnavailable(f"The guard's replica is unavailable ({type(error).__name__}).") from None
        except TimeoutError:
            response.cancel()
            raise GuardUnavailable(f"No guard answered within {deadline_s:.0f} s.") from None
        except asyncio.CancelledError:
            response.cancel()
            raise
        finally:
            self.in_flight -= 1

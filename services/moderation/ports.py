"""The interfaces that the moderator calls: policies, images, decoders, the guard and a circuit breaker."""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from services.core.messages import ImageRequest, ObjectReference
from services.core.tenancy import Scope
from services.core.values import (
    Action,
    Assessment,
    Detail,
    GuardPriority,
    Policy,
    PolicyChoice,
    PreparedImage,
    StoredObject,
)


class PolicySource(Protocol):
    """Chooses policy versions."""

    async def choose(self, request: ImageRequest, scope: Scope) -> PolicyChoice:
        """Return the policy version for a request. Raises UnknownPolicy (also out of `scope`), PolicyUnavailable."""


class ImageSource(Protocol):
    """Fetches images."""

    def open(self, reference: ObjectReference) -> AbstractAsyncContextManager[StoredObject]:
        """Fetch the object. Its memory stays reserved until the context ends.

        Raises Forbidden, NotFound, ObjectChanged, TooLarge, StoreUnavailable.
        """

    async def is_current_version(self, reference: ObjectReference) -> bool:
        """Whether the version of the reference is the present one of its key. Raises what `open` raises."""


class ImagePreparer(Protocol):
    """Decodes images for the model."""

    async def prepare(self, data: bytes) -> PreparedImage:
        """Decode, orient, downscale. Raises NotAnImage, TooLarge, Unavailable."""

    async def prepare_first_look(self, image: PreparedImage) -> PreparedImage:
        """Scale the image down for a first look. Raises what `prepare` raises."""


class GuardClient(Protocol):
    """Calls the model."""

    async def assess_each(
        self, image: PreparedImage, policies: Sequence[Policy], detail: Detail, priority: GuardPriority
    ) -> list[Assessment]:
        """Assess one image under each policy, in order. Raises GuardFailed, GuardUnavailable, UnreadableAnswer."""


class CircuitBreakerPort(Protocol):
    """Stops the blocks of a policy version whose block rate leaves its band.

    Implemented by `services.policies.circuit_breaker.CircuitBreaker`.
    """

    def count_and_allow(self, policy: Policy, action: Action, tenant: str | None) -> bool:
        """Count the action of a verdict for a tenant, or only look at the breaker if `tenant` is None.

        Returns False if the action is `block` and the circuit breaker of the version is open. The verdict then becomes
        a review.
        """

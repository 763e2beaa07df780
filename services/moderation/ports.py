"""What moderation needs from outside: policies, images, decoders, the guard and a circuit breaker."""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from services.core.messages import ImageRequest, ObjectReference
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
    """Where policies come from."""

    async def choose(self, request: ImageRequest) -> PolicyChoice:
        """The policy version for a request. Raises UnknownPolicy, PolicyUnavailable."""


class ImageSource(Protocol):
    """Where images come from."""

    def open(self, reference: ObjectReference) -> AbstractAsyncContextManager[StoredObject]:
        """The object; its memory stays reserved until the context ends.

        Raises Forbidden, NotFound, Changed, TooLarge, StoreUnavailable.
        """


class ImagePreparer(Protocol):
    """Decodes images for the model."""

    async def prepare(self, data: bytes) -> PreparedImage:
        """Decode, orient, downscale. Raises NotAnImage, TooLarge, Unavailable."""

    async def first_look(self, image: PreparedImage) -> PreparedImage:
        """The same image in the small size for screening. Raises what `prepare` raises."""


class GuardClient(Protocol):
    """The model: pure inference."""

    async def assess_each(
        self, image: PreparedImage, policies: Sequence[Policy], detail: Detail, priority: GuardPriority
    ) -> list[Assessment]:
        """Judge one image under several policies. Raises GuardFailed, GuardUnavailable, UnreadableAnswer."""


class Breaker(Protocol):
    """Keeps a policy version from blocking too much."""

    def allows(self, policy: Policy, action: Action) -> bool:
        """Count a verdict's action; whether the action may stand."""

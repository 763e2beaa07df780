"""Ports that repeat a call while their backend is unavailable, so that the moderator needs no retries of its own.

Wrap each port once, where the moderator is built. The waits are those of `retry_while_unavailable`.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from services.core.messages import ImageRequest, ObjectReference
from services.core.retry import retry_while_unavailable
from services.core.tenancy import Scope
from services.core.values import (
    Assessment,
    Detail,
    GuardPriority,
    Policy,
    PolicyChoice,
    PreparedImage,
    StoredObject,
)
from services.moderation.moderator import Moderator
from services.moderation.ports import CircuitBreakerPort, GuardClient, ImagePreparer, ImageSource, PolicySource


@dataclass(frozen=True, slots=True)
class RetryingPolicySource:
    """Retries while both Redis and the policy bucket are unavailable."""

    inner: PolicySource

    async def choose(self, request: ImageRequest, scope: Scope) -> PolicyChoice:
        return await retry_while_unavailable(lambda: self.inner.choose(request, scope))


@dataclass(frozen=True, slots=True)
class RetryingImageSource:
    """Retries while the object store is unavailable."""

    inner: ImageSource

    @asynccontextmanager
    async def open(self, reference: ObjectReference) -> AsyncIterator[StoredObject]:
        async with AsyncExitStack() as resources:
            yield await retry_while_unavailable(lambda: resources.enter_async_context(self.inner.open(reference)))

    async def is_current_version(self, reference: ObjectReference) -> bool:
        return await retry_while_unavailable(lambda: self.inner.is_current_version(reference))


@dataclass(frozen=True, slots=True)
class RetryingPreparer:
    """Retries while no decoder is available."""

    inner: ImagePreparer

    async def prepare(self, data: bytes) -> PreparedImage:
        return await retry_while_unavailable(lambda: self.inner.prepare(data))

    async def prepare_first_look(self, image: PreparedImage) -> PreparedImage:
        return await retry_while_unavailable(lambda: self.inner.prepare_first_look(image))


@dataclass(frozen=True, slots=True)
class RetryingGuard:
    """Retries while no engine is available."""

    inner: GuardClient

    async def assess_each(
        self, image: PreparedImage, policies: Sequence[Policy], detail: Detail, priority: GuardPriority
    ) -> list[Assessment]:
        return await retry_while_unavailable(lambda: self.inner.assess_each(image, policies, detail, priority))


def build_retrying_moderator(
    *,
    policies: PolicySource,
    images: ImageSource,
    preparer: ImagePreparer,
    guard: GuardClient,
    breaker: CircuitBreakerPort | None = None,
) -> Moderator:
    """Build a moderator that waits while any of its backends is unavailable."""
    return Moderator(
        policies=RetryingPolicySource(policies),
        images=RetryingImageSource(images),
        preparer=RetryingPreparer(preparer),
        guard=RetryingGuard(guard),
        breaker=breaker,
    )

"""What judges images, put together from the settings: the same for every deployment that has images judged."""

from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Final, Self

from ray.serve.handle import DeploymentHandle

from pipelines.serving.guard_deployment import RemoteGuard
from services.core.settings import Settings
from services.images.decoder_pool import DecoderPool
from services.images.object_store import ObjectStore
from services.moderation.moderator import Moderation
from services.policies.cache import PolicyCache
from services.policies.circuit_breaker import CircuitBreaker
from services.policies.redis_cache import PolicyRedisCache
from services.policies.registry import PolicyRegistry

_GUARD_PATIENCE: Final = 4
"""Deadlines of the guard that a call may take, waiting for a replica included."""


@dataclass(frozen=True, slots=True)
class Assembly:
    """A moderation and the parts of it that others use, too."""

    moderation: Moderation
    guard: RemoteGuard
    preparer: DecoderPool
    policies: PolicyCache
    registry: PolicyRegistry
    shared: PolicyRedisCache

    @classmethod
    async def from_settings(
        cls, settings: Settings, side_px: int, guard: DeploymentHandle[Any], closing: AsyncExitStack
    ) -> Self:
        """All of it, started; `closing` ends it. `side_px`: what the model can use. The guard need not be ready yet."""
        preparer, store = DecoderPool(settings, side_px), ObjectStore(settings)
        closing.callback(preparer.close)
        closing.callback(store.close)
        registry = PolicyRegistry.from_settings(settings)
        shared = PolicyRedisCache(settings.redis_url, settings.policy_bucket)
        closing.push_async_callback(shared.close)
        enter = closing.enter_async_context
        policies = await enter(PolicyCache(registry, shared, refresh_s=settings.policy_refresh_s))
        remote = RemoteGuard(guard, deadline_s=_GUARD_PATIENCE * settings.guard_deadline_s)
        moderation = Moderation(
            policies=policies,
            images=store,
            preparer=preparer,
            guard=remote,
            breaker=await enter(CircuitBreaker(policies, registry, shared)),
        )
        return cls(moderation, remote, preparer, policies, registry, shared)

"""The components that judge images, built from the settings; Intake and Gateway use the same ones."""

from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Self

from ray.serve.handle import DeploymentHandle

from pipelines.serving.guard_client import RemoteGuard
from services.core.settings import Settings
from services.images.decoder_pool import DecoderPool
from services.images.object_store import ObjectStore
from services.moderation.moderator import Moderator
from services.moderation.retrying import build_retrying_moderator
from services.policies.cache import PolicyCache
from services.policies.circuit_breaker import CircuitBreaker
from services.policies.redis_cache import PolicyRedisCache
from services.policies.registry import PolicyRegistry


@dataclass(frozen=True, slots=True)
class Components:
    """A moderator, and those of its parts that the deployments use themselves."""

    moderator: Moderator
    guard: RemoteGuard
    preparer: DecoderPool
    policies: PolicyCache
    registry: PolicyRegistry
    shared: PolicyRedisCache

    @classmethod
    async def from_settings(
        cls, settings: Settings, side_px: int, guard: DeploymentHandle[Any], closing: AsyncExitStack
    ) -> Self:
        """Build and start all components; `closing` stops them. The guard need not be ready yet.

        `side_px` is the longest side of an image, in pixels, that the model can use.
        """
        preparer, store = DecoderPool(settings, side_px), ObjectStore(settings)
        closing.callback(preparer.close)
        closing.callback(store.close)
        registry = PolicyRegistry.from_settings(settings)
        shared = PolicyRedisCache(settings.redis_url, settings.policy_bucket)
        closing.push_async_callback(shared.close)
        enter = closing.enter_async_context
        policies = await enter(PolicyCache(registry, shared, refresh_s=settings.policy_refresh_s))
        remote = RemoteGuard.from_settings(guard, settings)
        moderator = build_retrying_moderator(
            policies=policies,
            images=store,
            preparer=preparer,
            guard=remote,
            breaker=await enter(CircuitBreaker(policies, registry, shared)),
        )
        return cls(moderator, remote, preparer, policies, registry, shared)

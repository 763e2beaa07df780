"""The components that judge images, built from the settings. Intake and Gateway use the same ones."""

from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Self

from ray.serve.handle import DeploymentHandle

from pipelines.serving.guard_client import ServeGuardClient
from services.core.settings import Settings
from services.images.decoder_pool import DecoderPool
from services.images.object_store import ObjectStore
from services.moderation.moderator import Moderator
from services.moderation.retrying_ports import build_retrying_moderator
from services.policies.cache import PolicyCache
from services.policies.circuit_breaker import CircuitBreaker
from services.policies.redis_cache import PolicyRedisCache
from services.policies.registry import PolicyRegistry


@dataclass(frozen=True, slots=True)
class Components:
    """The moderator, and the parts of it that the deployments also use directly."""

    moderator: Moderator
    guard: ServeGuardClient
    decoder_pool: DecoderPool
    policies: PolicyCache
    registry: PolicyRegistry
    redis_cache: PolicyRedisCache

    @classmethod
    async def start(
        cls, settings: Settings, max_side_px: int, guard: DeploymentHandle[Any], closing: AsyncExitStack
    ) -> Self:
        """Start all components, and have `closing` stop them. The guard need not be ready yet.

        `max_side_px` is the longest side of an image, in pixels, that the model can use.
        """
        decoder_pool, images = DecoderPool(settings, max_side_px), ObjectStore(settings)
        closing.callback(decoder_pool.close)
        closing.callback(images.close)
        registry = PolicyRegistry.from_settings(settings)
        redis_cache = PolicyRedisCache.from_settings(settings)
        closing.push_async_callback(redis_cache.close)
        enter = closing.enter_async_context
        policies = await enter(PolicyCache(registry, redis_cache, refresh_s=settings.policy_refresh_s))
        guard_client = ServeGuardClient.from_settings(guard, settings)
        moderator = build_retrying_moderator(
            policies=policies,
            images=images,
            preparer=decoder_pool,
            guard=guard_client,
            breaker=await enter(CircuitBreaker(policies, registry, redis_cache)),
        )
        return cls(moderator, guard_client, decoder_pool, policies, registry, redis_cache)

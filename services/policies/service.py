"""Changes policies: writes each change to the policy bucket, and then notifies every process.

After a write to the registry alone, running processes would use the old version until their next refresh. So all
changes of a running system go through this service.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Self

from services.core.calibration import StoredCalibration
from services.core.errors import RedisUnavailable
from services.core.settings import Settings
from services.policies.redis_cache import PolicyRedisCache
from services.policies.registry import PolicyRegistry, StoredVersion
from services.policies.rollout import Canary, RolloutChange, Shadow
from services.policies.tenants import Document

if TYPE_CHECKING:
    from services.policies.cache import PolicyCache  # it loads Ray's metrics, which a command does not need

log = logging.getLogger(__name__)


class PolicyService:
    """Publishes and rolls out policies, and notifies the processes that judge by them.

    A change is effective once it is in the policy bucket. If Redis is down, `warn` is called, and the processes find
    the change at their next refresh. The methods raise the errors of PolicyRegistry.
    """

    def __init__(
        self,
        registry: PolicyRegistry,
        redis_cache: PolicyRedisCache | None,
        *,
        policies: "PolicyCache | None" = None,
        refresh_s: float | None = None,
        warn: Callable[[str], object] = log.warning,
    ) -> None:
        """`policies`: the cache of this process, which gets each change directly."""
        self._registry = registry
        self._redis_cache = redis_cache
        self._policies = policies
        self._delay = f"within {refresh_s:g} s" if refresh_s is not None else "at their next refresh"
        self._warn = warn

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings, *, warn: Callable[[str], object] = log.warning) -> AsyncIterator[Self]:
        """A service with its own connection to Redis, if the settings have one."""
        registry = PolicyRegistry.from_settings(settings)
        redis_cache = PolicyRedisCache.from_settings(settings) if settings.redis_url else None
        try:
            yield cls(registry, redis_cache, refresh_s=settings.policy_refresh_s, warn=warn)
        finally:
            if redis_cache:
                await redis_cache.close()

    async def publish(self, document: Document) -> StoredVersion:
        """Write the document as the next version of its name. It is not active yet."""
        stored = await asyncio.to_thread(self._registry.publish, document)
        if self._redis_cache:
            await self._notify(self._redis_cache.cache_version(stored))
        return stored

    async def activate(self, name: str, version: int, *, who: str, why: str = "") -> RolloutChange:
        """Make `version` the active version."""
        return await self._change(self._registry.activate, name, version, who=who, why=why)

    async def rollback(self, name: str, *, who: str, why: str = "") -> RolloutChange:
        """Activate the version that was active before. Its circuit breaker stays open if it is open."""
        return await self._change(self._registry.rollback, name, who=who, why=why)

    async def set_canary(self, name: str, canary: Canary | None, *, who: str, why: str = "") -> RolloutChange:
        """Set or remove the canary."""
        return await self._change(self._registry.set_canary, name, canary, who=who, why=why)

    async def set_shadow(self, name: str, shadow: Shadow | None, *, who: str, why: str = "") -> RolloutChange:
        """Set or remove the shadow."""
        return await self._change(self._registry.set_shadow, name, shadow, who=who, why=why)

    async def trip(self, name: str, version: int, *, since_change: int, who: str, why: str) -> RolloutChange:
        """Open the circuit breaker of a version."""
        return await self._change(self._registry.trip, name, version, since_change=since_change, who=who, why=why)

    async def calibrate(self, name: str, fitted: StoredCalibration, *, who: str, why: str = "") -> RolloutChange:
        """Apply a calibration to the scores of its version and checkpoint."""
        return await self._change(self._registry.calibrate, name, fitted, who=who, why=why)

    async def revert_calibration(
        self, name: str, version: int, revision: str, *, who: str, why: str = ""
    ) -> RolloutChange:
        """Apply the calibration that was applied before the present one, or none."""
        return await self._change(self._registry.revert_calibration, name, version, revision, who=who, why=why)

    async def _change(self, write: Callable[..., RolloutChange], *arguments: Any, **attribution: Any) -> RolloutChange:
        change = await asyncio.to_thread(write, *arguments, **attribution)
        if self._policies:
            self._policies.apply_change(change)
        if self._redis_cache:
            await self._notify(self._redis_cache.publish_change(change.name, change))
        return change

    async def _notify(self, notification: Awaitable[None]) -> None:
        try:
            await notification
        except RedisUnavailable as error:
            self._warn(f"{error}; the change is stored, and running processes apply it {self._delay}")

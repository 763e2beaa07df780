"""Changes to policies: each is written to the policy bucket, and then told to every process.

A caller that wrote to the registry alone would leave the running processes on the old version until their next
refresh. So every change of a running system is made here.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Self

from services.core.calibration import FittedCalibration
from services.core.errors import RedisUnavailable
from services.core.settings import Settings
from services.policies.redis_cache import PolicyRedisCache
from services.policies.registry import PolicyRegistry, StoredVersion
from services.policies.rollout import Canary, Change, Shadow
from services.policies.tenants import Document

if TYPE_CHECKING:
    from services.policies.cache import PolicyCache  # it loads Ray's metrics, which a command need not wait for

log = logging.getLogger(__name__)


class PolicyService:
    """Publishes and rolls out policies, and notifies the processes that judge by them.

    A change stands once it is in the policy bucket. While Redis is down it is not undone: `warn` gets a sentence, and
    the processes find the change at their next refresh. Methods raise what those of PolicyRegistry raise.
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
        """`policies`: the cache of this process, which takes a change over without Redis."""
        self._registry = registry
        self._redis_cache = redis_cache
        self._policies = policies
        self._delay = f"within {refresh_s:g} s" if refresh_s is not None else "at their next refresh"
        self._warn = warn

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings, *, warn: Callable[[str], object] = log.warning) -> AsyncIterator[Self]:
        """A service with its own connection to Redis, where the settings have one."""
        registry = PolicyRegistry.from_settings(settings)
        redis_cache = PolicyRedisCache(settings.redis_url, settings.policy_bucket) if settings.redis_url else None
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

    async def activate(self, name: str, version: int, *, who: str, why: str = "") -> Change:
        """Make `version` the one that new submissions get."""
        return await self._change(self._registry.activate, name, version, who=who, why=why)

    async def rollback(self, name: str, *, who: str, why: str = "") -> Change:
        """Make the version active that was active before the present one."""
        return await self._change(self._registry.rollback, name, who=who, why=why)

    async def set_canary(self, name: str, canary: Canary | None, *, who: str, why: str = "") -> Change:
        """Give a share of the traffic another version, or none."""
        return await self._change(self._registry.set_canary, name, canary, who=who, why=why)

    async def set_shadow(self, name: str, shadow: Shadow | None, *, who: str, why: str = "") -> Change:
        """Judge a share of the traffic by another version as well, or by none."""
        return await self._change(self._registry.set_shadow, name, shadow, who=who, why=why)

    async def trip(self, name: str, version: int, *, since: int, who: str, why: str) -> Change:
        """Open the circuit breaker of a version."""
        return await self._change(self._registry.trip, name, version, since=since, who=who, why=why)

    async def calibrate(self, name: str, fitted: FittedCalibration, *, who: str, why: str = "") -> Change:
        """Apply a calibration to the scores of its version and checkpoint."""
        return await self._change(self._registry.calibrate, name, fitted, who=who, why=why)

    async def revert_calibration(self, name: str, version: int, revision: str, *, who: str, why: str = "") -> Change:
        """Apply the calibration that was applied before the present one, or none."""
        return await self._change(self._registry.revert_calibration, name, version, revision, who=who, why=why)

    async def _change(self, write: Callable[..., Change], *arguments: Any, **attribution: Any) -> Change:
        change = await asyncio.to_thread(write, *arguments, **attribution)
        if self._policies:
            self._policies.accept(change)
        if self._redis_cache:
            await self._notify(self._redis_cache.publish_change(change.name, change))
        return change

    async def _notify(self, notification: Awaitable[None]) -> None:
        try:
            await notification
        except RedisUnavailable as error:
            self._warn(f"{error}: workers will know {self._delay}")

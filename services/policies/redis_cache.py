"""The policy data in Redis, which all processes share: copies of versions and rollouts, and announced changes.

The policy bucket is the source of truth. An entry in Redis may be missing, stale or invalid; then it is read again from
the bucket.
"""

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from services.core.errors import RedisUnavailable
from services.core.redis import TIMEOUT_S, RedisClient
from services.policies.registry import StoredVersion
from services.policies.rollout import RolloutChange
from services.policies.tenants import TENANTS

_LEASE_MS: Final = 5_000
_PING_S: Final = 5.0

_ABSENT_NAME_TTL_S: Final = 60
"""The time to live of an entry for a name without rollout. It is short, because a client can send any name."""

_NOW_MS: Final = """
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
"""
_PUBLISH: Final = f"""{_NOW_MS}
local known = redis.call('HGET', KEYS[1], 'number')
if known and tonumber(known) > tonumber(ARGV[1]) and ARGV[3] == '0' then return end
redis.call('HSET', KEYS[1], 'number', ARGV[1], 'change', ARGV[2], 'checked_ms', now_ms)
redis.call('PERSIST', KEYS[1])
if ARGV[4] ~= '0' then redis.call('EXPIRE', KEYS[1], ARGV[4]) end
if known ~= ARGV[1] and ARGV[2] ~= '' then redis.call('PUBLISH', KEYS[2], ARGV[2]) end
"""
_READ: Final = f"""{_NOW_MS}
local known = redis.call('HMGET', KEYS[1], 'change', 'checked_ms')
if not known[2] then return {{}} end
return {{known[1], now_ms - known[2]}}
"""
_RELEASE: Final = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


@dataclass(frozen=True, slots=True)
class CachedChange:
    """A rollout in Redis."""

    change: RolloutChange | None
    """None: there is no policy of that name, or it was never activated."""
    age_s: float
    """Seconds since it was last compared with the policy bucket."""


class PolicyRedisCache(RedisClient):
    """The copies of one policy bucket, in the Redis at SLUICE_REDIS_URL."""

    def __init__(self, url: str, bucket: str, *, timeout_s: float = TIMEOUT_S) -> None:
        """
        Raises:
            ConfigurationError: the URL is invalid.
        """
        super().__init__(url, f"sluice:{bucket}:policies:", timeout_s=timeout_s)

    async def find_version(self, name: str, version: int) -> StoredVersion | None:
        """The copy of a version; None if there is none, or if it does not match its digest."""
        data: Any = await self.call(self.client.get(self.key("version", f"{name}@{version}")))
        try:
            return StoredVersion.from_json(name, version, data) if data is not None else None
        except ValueError:
            return None

    async def cache_version(self, stored: StoredVersion) -> None:
        """Store a copy of a version."""
        await self.call(self.client.set(self.key("version", f"{stored.name}@{stored.version}"), stored.to_json()))

    async def find_newest_change(self, name: str) -> CachedChange | None:
        """The copy of a rollout; None if there is none that can be read."""
        entry = await self.run(_READ, [self.key("rollout", name)])
        try:
            change, age_ms = entry
            known = RolloutChange.model_validate_json(change) if change else None
        except (ValidationError, ValueError):
            return None
        return CachedChange(known, age_ms / 1000) if known is None or known.name == name else None

    async def publish_change(self, name: str, change: RolloutChange | None, *, even_if_older: bool = False) -> None:
        """Store a change that was just read from the bucket, or written to it, and announce it to every process.

        A change that is older than the copy is dropped, unless `even_if_older` says that the bucket has no newer one.
        """
        number = change.number if change else 0
        body = change.model_dump_json(by_alias=True) if change else ""
        keys = [self.key("rollout", name), self.key("changes")]
        expires_s = 0 if change or name == TENANTS else _ABSENT_NAME_TTL_S
        await self.run(_PUBLISH, keys, number, body, int(even_if_older), expires_s)

    async def subscribe(self, on_listening: Callable[[], Awaitable[None]]) -> AsyncIterator[RolloutChange]:
        """Yield announced changes. Calls `on_listening` once the subscription has begun."""
        async with self.client.pubsub(ignore_subscribe_messages=True) as listener:
            await self.call(listener.subscribe(self.key("changes")))
            await on_listening()
            silent = False
            while True:
                message = await self.call(listener.get_message(timeout=_PING_S))
                if message is None:
                    if silent:
                        raise RedisUnavailable("Redis (SLUICE_REDIS_URL) does not answer")
                    await self.call(listener.ping())
                silent = message is None
                try:
                    yield RolloutChange.model_validate_json(message["data"] if message else b"")
                except ValidationError:
                    continue

    async def lease(self, subject: str) -> str | None:
        """Take a lease of 5 s. Returns a token for `release`; None if another process has the lease."""
        token = uuid.uuid4().hex
        leased = await self.call(self.client.set(self.key("lease", subject), token, nx=True, px=_LEASE_MS))
        return token if leased else None

    async def release(self, subject: str, token: str) -> None:
        """Give a lease back, unless it has expired and another process has it."""
        await self.run(_RELEASE, [self.key("lease", subject)], token)

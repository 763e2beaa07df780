"""What the processes of a deployment share in Redis: copies of versions and roll-outs, and the news of changes.

Nothing here is the truth: every entry can be lost, stale or wrong, and is then fetched anew from the policy bucket.
"""

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from pydantic import ValidationError
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from services.core.errors import ConfigurationError, RedisUnavailable
from services.policies.registry import StoredVersion
from services.policies.rollout import Change
from services.policies.tenants import TENANTS

_ANSWER_S: Final = 2.0
_LEASE_MS: Final = 5_000
_PING_S: Final = 5.0

_NONE_S: Final = 60
"""How long it is remembered that a name has no roll-out; anyone can ask for any name."""

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
    """A roll-out as Redis has it."""

    change: Change | None
    """None: there is no policy of that name, or it was never activated."""
    age_s: float
    """Since it was last compared with the policy bucket."""


class PolicyRedisCache:
    """The entries of one policy bucket in one Redis. Any method raises RedisUnavailable where Redis does not answer."""

    def __init__(self, url: str, bucket: str) -> None:
        """
        Raises:
            ConfigurationError: the URL is wrong.
        """
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=8,
                timeout=_ANSWER_S,
                socket_timeout=_ANSWER_S,
                socket_connect_timeout=_ANSWER_S,
                retry=Retry(NoBackoff(), 0),
                protocol=2,
            )
        except ValueError as error:
            raise ConfigurationError(f"SLUICE_REDIS_URL is wrong: {error}") from None
        self._redis = Redis.from_pool(pool)
        self._prefix = f"sluice:{bucket}:policies:"
        self._script = cache(self._redis.register_script)

    async def close(self) -> None:
        await self._redis.aclose()

    async def version(self, name: str, version: int) -> StoredVersion | None:
        """The copy of a version, None where there is none or it does not match its own digest."""
        data = await self._call(self._redis.get(self.key("version", f"{name}@{version}")))
        try:
            return StoredVersion.from_json(name, version, data) if data is not None else None
        except ValueError:
            return None

    async def cache_version(self, stored: StoredVersion) -> None:
        """Keep a copy of a version."""
        await self._call(self._redis.set(self.key("version", f"{stored.name}@{stored.version}"), stored.to_json()))

    async def newest_change(self, name: str) -> CachedChange | None:
        """What is known of a roll-out, None where nothing is that can be read."""
        entry = await self.run(_READ, [self.key("rollout", name)])
        try:
            change, age_ms = entry
            known = Change.model_validate_json(change) if change else None
        except (ValidationError, ValueError):
            return None
        return CachedChange(known, age_ms / 1000) if known is None or known.name == name else None

    async def publish_change(self, name: str, change: Change | None, *, even_if_older: bool = False) -> None:
        """Keep what was just read from the bucket, or written to it, and tell every process of it.

        An older change than the copy is dropped, unless it is known that the bucket has nothing newer.
        """
        number = change.number if change else 0
        body = change.model_dump_json(by_alias=True) if change else ""
        keys = [self.key("rollout", name), self.key("changes")]
        expires_s = 0 if change or name == TENANTS else _NONE_S
        await self.run(_PUBLISH, keys, number, body, int(even_if_older), expires_s)

    async def subscribe(self, on_listening: Callable[[], Awaitable[None]]) -> AsyncIterator[Change]:
        """Changes as they are announced; `on_listening` is called when nothing can be missed any more."""
        async with self._redis.pubsub(ignore_subscribe_messages=True) as listener:
            await self._call(listener.subscribe(self.key("changes")))
            await on_listening()
            silent = False
            while True:
                message = await self._call(listener.get_message(timeout=_PING_S))
                if message is None:
                    if silent:
                        raise RedisUnavailable("Redis (SLUICE_REDIS_URL) does not answer")
                    await self._call(listener.ping())
                silent = message is None
                try:
                    yield Change.model_validate_json(message["data"] if message else b"")
                except ValidationError:
                    continue

    async def lease(self, what: str) -> str | None:
        """Be the only process that does something for some seconds: a token for `release`, None where another is."""
        token = uuid.uuid4().hex
        taken = await self._call(self._redis.set(self.key("lease", what), token, nx=True, px=_LEASE_MS))
        return token if taken else None

    async def release(self, what: str, token: str) -> None:
        await self.run(_RELEASE, [self.key("lease", what)], token)

    async def run(self, script: str, keys: Sequence[str], *arguments: str | float) -> Any:
        """Run a Lua script on the server."""
        return await self._call(self._script(script)(keys, arguments))

    def key(self, *parts: str) -> str:
        """The name of an entry of this policy bucket."""
        return self._prefix + ":".join(parts)

    async def _call(self, answer: Awaitable[Any]) -> Any:
        try:
            return await answer
        except (RedisError, OSError, TimeoutError) as error:
            raise RedisUnavailable(f"Redis (SLUICE_REDIS_URL) does not answer: {error}") from error

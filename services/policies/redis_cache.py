"""The policy data in Redis, which all processes share: copies of versions and rollouts, and announced changes.

The policy bucket is the source of truth. An entry in Redis may be missing, stale, invalid or forged. Entries that were
signed (`services.core.redis_signatures`) may be used as they are; all others must be compared with the bucket.

Version 0.1.0 reads and writes the same entries without signatures, so signatures have keys and fields of their own.
"""

import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Self, cast

from pydantic import SecretStr, ValidationError

from services.core.errors import RedisUnavailable
from services.core.redis import TIMEOUT_S, RedisClient
from services.core.redis_signatures import RedisSigner
from services.core.settings import Settings
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
# An older change is announced as well: the higher number in Redis may be forged.
_PUBLISH: Final = f"""{_NOW_MS}
local known = redis.call('HGET', KEYS[1], 'number')
if known and (tonumber(known) or 0) > tonumber(ARGV[1]) and ARGV[3] == '0' then
    if ARGV[2] ~= '' then redis.call('PUBLISH', KEYS[2], ARGV[2]) end
    return
end
redis.call('HSET', KEYS[1], 'number', ARGV[1], 'change', ARGV[2], 'checked_ms', now_ms)
redis.call('HDEL', KEYS[1], 'signed_ms', 'signature')
if ARGV[6] ~= '' then redis.call('HSET', KEYS[1], 'signed_ms', ARGV[5], 'signature', ARGV[6]) end
redis.call('PERSIST', KEYS[1])
if ARGV[4] ~= '0' then redis.call('EXPIRE', KEYS[1], ARGV[4]) end
if known ~= ARGV[1] and ARGV[2] ~= '' then redis.call('PUBLISH', KEYS[2], ARGV[2]) end
"""
_READ: Final = "return redis.call('HMGET', KEYS[1], 'change', 'signed_ms', 'signature')"
_MAX_CLOCK_SKEW_S: Final = 5.0
"""A signature from further in the future counts as too old."""
_RELEASE: Final = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


@dataclass(frozen=True, slots=True)
class CachedChange:
    """A rollout in Redis."""

    change: RolloutChange | None
    """None: there is no policy of that name, or it was never activated."""
    is_signed: bool
    """Whether a process with the same key has read it from the policy bucket, or written it there."""
    age_s: float
    """Seconds since then, by the clocks of the processes; infinite without a signature. Never negative."""


@dataclass(frozen=True, slots=True)
class CachedVersion:
    """A version in Redis."""

    stored: StoredVersion
    is_signed: bool
    """Whether a process with the same key has read it from the policy bucket, or written it there."""


class PolicyRedisCache(RedisClient):
    """The copies of one policy bucket, in the Redis at SLUICE_REDIS_URL."""

    def __init__(
        self, url: str, bucket: str, *, signing_key: SecretStr | None = None, timeout_s: float = TIMEOUT_S
    ) -> None:
        """`signing_key`: SLUICE_REDIS_SIGNING_KEY. Without it nothing is signed, and no signature is valid.

        Raises:
            ConfigurationError: the URL is invalid.
        """
        prefix = f"sluice:{bucket}:policies:"
        super().__init__(url, prefix, timeout_s=timeout_s)
        self.signer = RedisSigner(signing_key, prefix)

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """The copies of SLUICE_POLICY_BUCKET in the Redis at SLUICE_REDIS_URL."""
        return cls(settings.redis_url, settings.policy_bucket, signing_key=settings.redis_signing_key)

    async def find_version(self, name: str, version: int) -> CachedVersion | None:
        """The copy of a version; None if there is none.

        Raises:
            ValueError: the copy cannot be read, or does not match its digest.
        """
        keys = [self.key(kind, f"{name}@{version}") for kind in ("version", "version-signature")]
        data, signature = cast("list[bytes | None]", await self.call(self.client.mget(keys)))
        if data is None:
            return None
        stored = StoredVersion.from_json(name, version, data)
        return CachedVersion(stored, self.signer.is_valid(signature, "version", f"{name}@{version}", stored.digest))

    async def cache_version(self, stored: StoredVersion) -> None:
        """Store a copy of a version."""
        name = f"{stored.name}@{stored.version}"
        copies: dict[str, str | bytes] = {self.key("version", name): stored.to_json()}
        if self.signer.can_sign:
            copies[self.key("version-signature", name)] = self.signer.sign("version", name, stored.digest)
        await self.call(self.client.mset(copies))

    async def find_newest_change(self, name: str) -> CachedChange | None:
        """The copy of a rollout; None if there is none.

        Raises:
            ValueError: the copy cannot be read, or is of another policy.
        """
        body, signed_ms, signature = await self.run(_READ, [self.key("rollout", name)])
        if body is None:
            return None
        change = RolloutChange.model_validate_json(body) if body else None  # its error is a ValueError
        if change and change.name != name:
            raise ValueError(f"the copy of the rollout of {name} is of another policy")
        is_signed = self.signer.is_valid(signature, "rollout", name, signed_ms or b"", body)
        age_s = time.time() - int(signed_ms) / 1000 if is_signed else math.inf
        return CachedChange(change, is_signed, max(0.0, age_s) if age_s > -_MAX_CLOCK_SKEW_S else math.inf)

    async def publish_change(self, name: str, change: RolloutChange | None, *, even_if_older: bool = False) -> None:
        """Store a change that was just read from the bucket, or written to it, and announce it to every process.

        A change that is older than the copy is dropped, unless `even_if_older` says that the bucket has no newer one.
        """
        number = change.number if change else 0
        body = change.model_dump_json(by_alias=True) if change else ""
        keys = [self.key("rollout", name), self.key("changes")]
        expires_s = 0 if change or name == TENANTS else _ABSENT_NAME_TTL_S
        signed_ms, signature = str(int(time.time() * 1000)), ""
        if self.signer.can_sign:
            signature = self.signer.sign("rollout", name, signed_ms, body)
        await self.run(_PUBLISH, keys, number, body, int(even_if_older), expires_s, signed_ms, signature)

    async def subscribe(self, on_listening: Callable[[], Awaitable[None]]) -> AsyncIterator[RolloutChange]:
        """Yield announced changes. Calls `on_listening` once the subscription has begun.

        Announcements are not signed, so that version 0.1.0 can read them. Each one has to be checked.
        """
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

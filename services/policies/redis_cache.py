"""The policy data in Redis, which all processes share: copies of versions and rollouts, and announced changes.

The policy bucket is the source of truth. An entry in Redis may be missing, stale, invalid or forged. Entries that were
signed (`services.core.redis_signatures`) may be used as they are; all others must be compared with the bucket.

Parsing JSON blocks the event loop, so its size is bounded. Redis returns no entry above `ENTRY_LIMIT_BYTES`, an entry
is parsed after its signature is checked, and JSON without a signature is parsed only up to `UNSIGNED_LIMIT_BYTES`.
Larger JSON without a signature is only compared with that of the bucket, as text.

Version 0.1.0 reads and writes the same entries without signatures, so signatures have keys and fields of their own.
"""

import math
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Self

from pydantic import SecretStr

from services.core.errors import RedisUnavailable
from services.core.redis import READ_FUNCTIONS, TIMEOUT_S, RedisClient
from services.core.redis_signatures import RedisSigner
from services.core.settings import Settings
from services.policies.registry import StoredVersion
from services.policies.rollout import RolloutChange
from services.policies.tenants import TENANTS

ENTRY_LIMIT_BYTES: Final = 1 << 20
"""No process stores or announces more. A file of 256 KiB (`DOCUMENT_LIMIT_BYTES`) makes a version of at most twice its
size, plus defaults. A rollout grows by up to 30 KB with each calibrated version and checkpoint; a process that reads a
larger one from the bucket does not store it."""
UNSIGNED_LIMIT_BYTES: Final = 64 << 10
"""JSON that nobody has signed is parsed only up to this size."""

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
# These return -1 for a value above the limit, or of another type.
_READ: Final = f"""{READ_FUNCTIONS}
local values = {{}}
for n, field in ipairs({{'change', 'signed_ms', 'signature'}}) do
    values[n] = read_field(KEYS[1], field, ARGV[1], -1)
end
return values
"""
_READ_VERSION: Final = f"""{READ_FUNCTIONS}
local values = {{}}
for n, key in ipairs(KEYS) do values[n] = read(key, ARGV[1], -1) end
return values
"""
_DROP: Final = "redis.call('DEL', KEYS[1])"
_HEAD: Final = re.compile(rb'\{"name":"([a-z0-9_-]{1,64})","number":([0-9]{1,8}),')
"""The beginning of a change, as every version writes it."""
_COMMAS: Final = bytes.maketrans(b"[]", b",,")
_MAX_CLOCK_SKEW_S: Final = 5.0
"""A signature from further in the future counts as too old."""
_RELEASE: Final = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


@dataclass(frozen=True)
class CachedChange:
    """A rollout in Redis."""

    name: str
    body: bytes
    """JSON; empty if there is no policy of that name, or if it was never activated."""
    is_signed: bool
    """Whether a process with the same key has read it from the policy bucket, or written it there."""
    age_s: float
    """Seconds since then, by the clocks of the processes; infinite without a signature. Never negative."""

    @cached_property
    def change(self) -> RolloutChange | None:
        """The change; None if there is no policy of that name, or if it was never activated.

        Raises:
            ValueError: the copy cannot be read, is too large without a signature, or is of another policy.
        """
        if not self.body:
            return None
        _check_size(self.body, self.is_signed)
        change = RolloutChange.model_validate_json(self.body)  # its error is a ValueError
        if change.name != self.name:
            raise ValueError(f"the copy of the rollout of {self.name} is of another policy")
        return change

    @property
    def number(self) -> int:
        """The number that the body begins with. 0: there is no change, or it cannot be read."""
        head = _HEAD.match(self.body)
        return int(head[2]) if head and head[1] == self.name.encode() else 0

    def is_of(self, change: RolloutChange | None) -> bool:
        """Whether this is a copy of a change."""
        if not self.is_signed and len(self.body) > UNSIGNED_LIMIT_BYTES:
            expected = _encode_change(change).encode()
            return len(self.body) == len(expected) and _sort_parts(self.body) == _sort_parts(expected)
        try:
            return self.change == change
        except ValueError:
            return False


@dataclass(frozen=True)
class CachedVersion:
    """A version in Redis."""

    name: str
    version: int
    body: bytes
    is_signed: bool
    """Whether a process with the same key has read it from the policy bucket, or written it there."""

    @cached_property
    def stored(self) -> StoredVersion:
        """The version.

        Raises:
            ValueError: the copy cannot be read, is too large without a signature, or does not match its digest.
        """
        _check_size(self.body, self.is_signed)
        return StoredVersion.from_json(self.name, self.version, self.body)

    def is_of(self, stored: StoredVersion) -> bool:
        """Whether this is a copy of a version."""
        if self.body == stored.to_json():
            return True
        try:
            return self.stored.digest == stored.digest
        except ValueError:
            return False


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
            ValueError: the copy is larger than any that a process stores.
        """
        keys = [self.key(kind, f"{name}@{version}") for kind in ("version", "version-signature")]
        body, signature = await self._read(_READ_VERSION, keys)
        if body is None:
            return None
        is_signed = self.signer.is_valid(signature, "version", f"{name}@{version}", body)
        return CachedVersion(name, version, body, is_signed)

    async def cache_version(self, stored: StoredVersion) -> None:
        """Store a copy of a version, unless it is too large."""
        name, body = f"{stored.name}@{stored.version}", stored.to_json()
        if len(body) > ENTRY_LIMIT_BYTES:
            return
        copies: dict[str, str | bytes] = {self.key("version", name): body}
        if self.signer.can_sign:
            copies[self.key("version-signature", name)] = self.signer.sign("version", name, body)
        await self.call(self.client.mset(copies))

    async def find_newest_change(self, name: str) -> CachedChange | None:
        """The copy of a rollout; None if there is none.

        Raises:
            ValueError: the copy is larger than any that a process stores.
        """
        body, signed_ms, signature = await self._read(_READ, [self.key("rollout", name)])
        if body is None:
            return None
        is_signed = self.signer.is_valid(signature, "rollout", name, signed_ms or b"", body)
        age_s = time.time() - int(signed_ms or 0) / 1000 if is_signed else math.inf
        return CachedChange(name, body, is_signed, max(0.0, age_s) if age_s > -_MAX_CLOCK_SKEW_S else math.inf)

    async def publish_change(self, name: str, change: RolloutChange | None, *, even_if_older: bool = False) -> None:
        """Store a change that was just read from the bucket, or written to it, and announce it to every process.

        A change that is older than the copy is dropped, unless `even_if_older` says that the bucket has no newer one.
        A change that is too large is neither stored nor announced: each process reads it with its next refresh.
        """
        number = change.number if change else 0
        body = _encode_change(change)
        if len(body.encode()) > ENTRY_LIMIT_BYTES:
            await self.run(_DROP, [self.key("rollout", name)])
            return
        keys = [self.key("rollout", name), self.key("changes")]
        expires_s = 0 if change or name == TENANTS else _ABSENT_NAME_TTL_S
        signed_ms, signature = str(int(time.time() * 1000)), ""
        if self.signer.can_sign:
            signature = self.signer.sign("rollout", name, signed_ms, body)
        await self.run(_PUBLISH, keys, number, body, int(even_if_older), expires_s, signed_ms, signature)

    async def subscribe(self, on_listening: Callable[[], Awaitable[None]]) -> AsyncIterator[CachedChange | None]:
        """Yield announced changes, and None for one that is larger than any that a process announces.

        Announcements are not signed, so that version 0.1.0 can read them. Each one has to be checked. None of them is
        parsed here. Calls `on_listening` once the subscription has begun.
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
                body = message["data"] if message else b""
                if len(body) > ENTRY_LIMIT_BYTES:
                    yield None
                elif head := _HEAD.match(body):
                    yield CachedChange(head[1].decode(), body, is_signed=False, age_s=math.inf)

    async def lease(self, subject: str) -> str | None:
        """Take a lease of 5 s. Returns a token for `release`; None if another process has the lease."""
        token = uuid.uuid4().hex
        leased = await self.call(self.client.set(self.key("lease", subject), token, nx=True, px=_LEASE_MS))
        return token if leased else None

    async def release(self, subject: str, token: str) -> None:
        """Give a lease back, unless it has expired and another process has it."""
        await self.run(_RELEASE, [self.key("lease", subject)], token)

    async def _read(self, script: str, keys: list[str]) -> list[bytes | None]:
        values: list[Any] = await self.run(script, keys, ENTRY_LIMIT_BYTES)
        if any(isinstance(value, int) for value in values):
            raise ValueError(f"a value of {keys[0]} is larger than {ENTRY_LIMIT_BYTES} bytes, or of another type")
        return values


def _encode_change(change: RolloutChange | None) -> str:
    return change.model_dump_json(by_alias=True) if change else ""


def _sort_parts(body: bytes) -> list[bytes]:
    """The parts of a change in an order of their own: sets are written in any order."""
    return sorted(body.translate(_COMMAS).split(b","))


def _check_size(body: bytes, is_signed: bool) -> None:
    if not is_signed and len(body) > UNSIGNED_LIMIT_BYTES:
        raise ValueError(f"{len(body)} bytes without a signature are not parsed")

"""The log of replayed dead letters in Redis, and the lease that lets one command replay at a time."""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import islice
from typing import Final, Self

from redis.asyncio.lock import Lock
from redis.exceptions import LockError, RedisError

from pipelines.intake.replayed_attempts import ReplayedAttempts
from services.core.errors import SluiceError
from services.core.redis import RedisClient, map_redis_errors
from services.core.settings import Settings
from services.core.tasks import cancel_and_wait

_TIMEOUT_S: Final = 5.0
_LEASE_S: Final = 20.0
"""The lease of a killed command expires after this time. Until then the next command waits."""
_RENEW_INTERVAL_S: Final = _LEASE_S / 4
_IDS_PER_CALL: Final = 1000


class ReplayLog:
    """An async context manager. With `lease`, no other command can replay until it is left.

    Every method raises RedisUnavailable if Redis does not answer.
    """

    def __init__(self, settings: Settings, *, lease: bool, progress: Callable[[str], None]) -> None:
        """
        Raises:
            ConfigurationError: SLUICE_REDIS_URL is invalid.
        """
        self._redis = RedisClient(settings.redis_url, f"sluice:{settings.dead_letters_stream}:", timeout_s=_TIMEOUT_S)
        self._key = self._redis.key("replayed")
        self._attempts = ReplayedAttempts(self._redis, settings.dead_letters_stream)
        self._lock: Lock | None = (
            self._redis.client.lock(self._redis.key("replaying"), timeout=_LEASE_S) if lease else None
        )
        self._renewing: asyncio.Task[None] | None = None
        self._progress = progress

    async def __aenter__(self) -> Self:
        try:
            await self._acquire()
        except BaseException:
            await self._redis.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._renewing and self._lock:
            await cancel_and_wait(self._renewing)
            with suppress(RedisError, OSError):
                await self._lock.release()
        await self._redis.close()

    async def contains(self, replay_ids: Iterable[bytes]) -> set[bytes]:
        """The given ids that are in the log."""
        known: set[bytes] = set()
        for chunk in _chunks(replay_ids):
            answers = await self._redis.call(self._redis.client.smismember(self._key, chunk))
            known |= {replay_id for replay_id, is_member in zip(chunk, answers, strict=True) if is_member}
        return known

    async def add(self, replay_ids: Iterable[bytes]) -> None:
        """Add ids to the log. They never expire."""
        for chunk in _chunks(replay_ids):
            await self._redis.call(self._redis.client.sadd(self._key, *chunk))

    async def record_attempts(self, attempts: Mapping[tuple[str, bytes], int]) -> None:
        """Record the tries of dead letters, by their position and value, for the Intake that gets their replay."""
        await self._attempts.record(attempts)

    async def renew(self) -> None:
        """Renew the lease.

        Raises:
            SluiceError: the lease expired, because this process was stopped or Redis was down for too long. Another
                command may be replaying.
        """
        with map_redis_errors():
            try:
                held = self._lock is not None and await self._lock.reacquire()
            except LockError:
                held = False
        if not held:
            raise SluiceError(
                "the replay lease expired, because this process was stopped or Redis was down for too long. Finished "
                "replays are recorded: run the command again to continue"
            )

    async def _acquire(self) -> None:
        lock = self._lock
        if lock is None:
            return
        if not await self._redis.call(lock.acquire(blocking=False)):
            wait_s = _LEASE_S + _RENEW_INTERVAL_S
            self._progress(f"another replay is running or was killed; waiting up to {wait_s:g} s for its lease")
            if not await self._redis.call(lock.acquire(blocking_timeout=wait_s)):
                raise SluiceError("another replay is running; nothing was replayed. Run the command again later")
        self._renewing = asyncio.create_task(self._renew_periodically(lock))

    async def _renew_periodically(self, lock: Lock) -> None:
        while True:
            await asyncio.sleep(_RENEW_INTERVAL_S)
            with suppress(RedisError, OSError):  # `renew` reports a lost lease
                await lock.reacquire()


def _chunks(replay_ids: Iterable[bytes]) -> Iterable[list[bytes]]:
    remaining = iter(replay_ids)
    while chunk := list(islice(remaining, _IDS_PER_CALL)):
        yield chunk

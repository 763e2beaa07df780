"""What Redis remembers of replays: which dead letters went back, and who is replaying now."""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import islice
from typing import Any, Final, Self

from redis.asyncio import Redis
from redis.asyncio.lock import Lock
from redis.exceptions import LockError, RedisError

from services.core.errors import ConfigurationError, SluiceError, Unavailable
from services.core.settings import Settings
from services.core.tasks import cancel_and_wait

_ANSWER_S: Final = 5.0
_LEASE_S: Final = 20.0
"""How long a command that was killed keeps the next one waiting."""
_RENEW_S: Final = _LEASE_S / 4
_AT_ONCE: Final = 1000


class ReplayLog:
    """To be used as an async context manager. With `lease`, no other command replays until it ends.

    Every method raises Unavailable where Redis does not answer.
    """

    def __init__(self, settings: Settings, *, lease: bool, progress: Callable[[str], None]) -> None:
        """
        Raises:
            ConfigurationError: the URL is wrong.
        """
        try:
            self._redis = Redis.from_url(
                settings.redis_url, socket_timeout=_ANSWER_S, socket_connect_timeout=_ANSWER_S, protocol=2
            )
        except ValueError as error:
            raise ConfigurationError(f"SLUICE_REDIS_URL is wrong: {error}") from None
        self._key = f"sluice:{settings.dead_letters_stream}:replayed"
        self._lock: Lock | None = (
            self._redis.lock(f"sluice:{settings.dead_letters_stream}:replaying", timeout=_LEASE_S) if lease else None
        )
        self._renewing: asyncio.Task[None] | None = None
        self._progress = progress

    async def __aenter__(self) -> Self:
        try:
            await self._acquire()
        except BaseException:
            await self._redis.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._renewing and self._lock:
            await cancel_and_wait(self._renewing)
            with suppress(RedisError, OSError):
                await self._lock.release()
        await self._redis.aclose()

    async def contains(self, marks: Iterable[bytes]) -> set[bytes]:
        """Those of `marks` that are kept."""
        found: set[bytes] = set()
        for some in _chunks(marks):
            answers = await _answer(self._redis.smismember(self._key, some))
            found |= {mark for mark, is_member in zip(some, answers, strict=True) if is_member}
        return found

    async def add(self, marks: Iterable[bytes]) -> None:
        """Remember `marks` for good."""
        for some in _chunks(marks):
            await _answer(self._redis.sadd(self._key, *some))

    async def renew(self) -> None:
        """Make sure that no other command has begun to replay.

        Raises:
            SluiceError: one has, because this one was stopped or Redis was away for too long.
        """
        try:
            held = self._lock is not None and await self._lock.reacquire()
        except LockError:
            held = False
        except (RedisError, OSError) as error:
            raise _away(error) from error
        if not held:
            raise SluiceError("the right to replay was lost while this command was held up; start it again")

    async def _acquire(self) -> None:
        lock = self._lock
        if lock is None:
            return
        if not await _answer(lock.acquire(blocking=False)):
            self._progress(f"another replay is running, or was killed: waiting for up to {_LEASE_S + _RENEW_S:g} s")
            if not await _answer(lock.acquire(blocking_timeout=_LEASE_S + _RENEW_S)):
                raise SluiceError("another replay is running; nothing was replayed, try again when it has ended")
        self._renewing = asyncio.create_task(self._renew_periodically(lock))

    async def _renew_periodically(self, lock: Lock) -> None:
        while True:
            await asyncio.sleep(_RENEW_S)
            with suppress(RedisError, OSError):  # `renew` finds out
                await lock.reacquire()


async def _answer(asked: Any) -> Any:
    try:
        return await asked
    except (RedisError, OSError) as error:
        raise _away(error) from error


def _away(error: Exception) -> Unavailable:
    return Unavailable(f"Redis at SLUICE_REDIS_URL does not answer: {str(error) or type(error).__name__}")


def _chunks(marks: Iterable[bytes]) -> Iterable[list[bytes]]:
    remaining = iter(marks)
    while some := list(islice(remaining, _AT_ONCE)):
        yield some

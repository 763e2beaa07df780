"""Places at the engine: how many calls it gets at a time, who comes first, and who has to come alone."""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

from services.core.errors import GuardFailed, GuardUnavailable
from services.core.messages import Turn

_FAILURES: Final = 3
_REMEMBERED: Final = 1024
_ORDER: Final[tuple[Turn, ...]] = ("interactive", "live", "backfill")


class EngineFailed(GuardUnavailable):
    """The engine failed, or went away, in the middle of a call."""


class Places:
    """Up to `count` calls at a time; `interactive` before `live` before `backfill`.

    When the engine fails, each image that it had may be the cause. Such a suspect comes alone the next time, right
    after the engine gave a sign of life, so that a second failure is its own: an engine that someone else brought down
    is no proof. After three it is given up; one success clears it.
    """

    def __init__(self, count: int, prove_alive: Callable[[], Awaitable[None]]) -> None:
        """`prove_alive` raises GuardUnavailable unless the engine works."""
        self._count = count
        self._prove_alive = prove_alive
        self._taken = 0
        self._one_alone = False
        self._suspects_waiting = 0
        self._waiting = Counter[Turn]()
        self._changed = asyncio.Condition()
        self._failures: OrderedDict[str, int] = OrderedDict()

    @asynccontextmanager
    async def take(self, sha256: str, turn: Turn = "live") -> AsyncIterator[None]:
        """Hold a place for one image's call.

        Raises:
            GuardFailed: instead of an EngineFailed of the body, when this image alone made the engine fail.
            GuardUnavailable: the engine does not work.
        """
        suspect = sha256 in self._failures
        await (self._enter_alone() if suspect else self._enter(turn))
        try:
            if suspect:
                await self._prove_alive()
            yield
        except EngineFailed:
            failures = self._failures.pop(sha256, 0) + 1
            if suspect and failures >= _FAILURES:
                raise GuardFailed(f"The image made the engine fail {failures} times.") from None
            self._failures[sha256] = failures
            if len(self._failures) > _REMEMBERED:
                self._failures.popitem(last=False)
            raise
        else:
            self._failures.pop(sha256, None)
        finally:
            await asyncio.shield(self._leave())

    async def _enter(self, turn: Turn) -> None:
        async with self._changed:
            before = _ORDER[: _ORDER.index(turn)]
            self._waiting[turn] += 1
            try:
                await self._changed.wait_for(
                    lambda: (
                        self._taken < self._count
                        and not self._one_alone
                        and not self._suspects_waiting
                        and not any(self._waiting[other] for other in before)
                    )
                )
                self._taken += 1
            finally:
                self._waiting[turn] -= 1
                self._changed.notify_all()

    async def _enter_alone(self) -> None:
        async with self._changed:
            self._suspects_waiting += 1
            try:
                await self._changed.wait_for(lambda: self._taken == 0)
                self._taken, self._one_alone = 1, True
            finally:
                self._suspects_waiting -= 1
                self._changed.notify_all()

    async def _leave(self) -> None:
        async with self._changed:
            self._taken -= 1
            self._one_alone = False
            self._changed.notify_all()

"""Slots for calls to the engine: concurrency, priority, and isolation of images that may crash it.

Three words name the states of an image. It is *suspected* after a failure of the engine, it runs *isolated* when it is
tried again, and it is *confirmed poison* after the third failure. `pipelines.intake.crash_isolation` isolates messages
that may crash a worker process, with the same three words. There, a suspected message is isolated only after its second
crash, and the state is in Redis. Here, a suspected image is isolated on its next try, and the state is in this process.
"""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

from services.core.errors import EngineFailed, GuardFailed
from services.core.values import GuardPriority

_FAILURE_LIMIT: Final = 3
_SUSPECT_LIMIT: Final = 1024
_ORDER: Final[tuple[GuardPriority, ...]] = ("interactive", "live", "backfill")


class EngineSlots:
    """Up to `count` calls at a time; `interactive` before `live` before `backfill`.

    When the engine fails, every image that was in flight is suspected. The next call with a suspected image is
    isolated: it runs alone, and only after a health check passed, so that another failure is caused by this image. The
    third failure makes it confirmed poison (GuardFailed). A success clears it.
    """

    def __init__(self, count: int, health_check: Callable[[], Awaitable[None]]) -> None:
        """`health_check` raises GuardUnavailable if the engine is not healthy."""
        self._count = count
        self._health_check = health_check
        self._taken = 0
        self._isolated = False
        self._suspected_waiting = 0
        self._waiting = Counter[GuardPriority]()
        self._changed = asyncio.Condition()
        self._failures: OrderedDict[str, int] = OrderedDict()

    @asynccontextmanager
    async def acquire(self, sha256: str, priority: GuardPriority = "live") -> AsyncIterator[None]:
        """Hold a slot for one image's call.

        Raises:
            GuardFailed: raised in place of EngineFailed when the image is confirmed poison.
            GuardUnavailable: the health check failed.
        """
        suspected = sha256 in self._failures
        await (self._wait_for_isolation() if suspected else self._wait_for_slot(priority))
        try:
            if suspected:
                await self._health_check()
            yield
        except EngineFailed:
            failures = self._failures.pop(sha256, 0) + 1
            if suspected and failures >= _FAILURE_LIMIT:
                raise GuardFailed(f"The image made the engine fail {failures} times.") from None
            self._failures[sha256] = failures
            if len(self._failures) > _SUSPECT_LIMIT:
                self._failures.popitem(last=False)
            raise
        else:
            self._failures.pop(sha256, None)
        finally:
            await asyncio.shield(self._release())

    async def _wait_for_slot(self, priority: GuardPriority) -> None:
        async with self._changed:
            before = _ORDER[: _ORDER.index(priority)]
            self._waiting[priority] += 1
            try:
                await self._changed.wait_for(
                    lambda: (
                        self._taken < self._count
                        and not self._isolated
                        and not self._suspected_waiting
                        and not any(self._waiting[other] for other in before)
                    )
                )
                self._taken += 1
            finally:
                self._waiting[priority] -= 1
                self._changed.notify_all()

    async def _wait_for_isolation(self) -> None:
        async with self._changed:
            self._suspected_waiting += 1
            try:
                await self._changed.wait_for(lambda: self._taken == 0)
                self._taken, self._isolated = 1, True
            finally:
                self._suspected_waiting -= 1
                self._changed.notify_all()

    async def _release(self) -> None:
        async with self._changed:
            self._taken -= 1
            self._isolated = False
            self._changed.notify_all()

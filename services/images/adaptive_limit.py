"""How many requests the object store gets at a time: fewer when it says that it gets too many."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from services.core.errors import StoreUnavailable

_LESS: Final = 0.5
_CALM_S: Final = 1.0
"""Complaints about requests that were sent before the last reduction say nothing new."""


class Throttled(StoreUnavailable):
    """The object store asks for fewer requests (503 SlowDown, 429)."""


class AdaptiveLimit:
    """Bounds requests in flight: halved by each `Throttled`, and one more for each full round of successes.

    Additive increase, multiplicative decrease (Chiu and Jain, 1989), as in TCP. For use from one event loop.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`most`: never more than this, and as many at the start."""
        self._most = most
        self._limit = float(most)
        self._clock = clock
        self._taken = 0
        self._calm_from = float("-inf")
        self._changed = asyncio.Condition()

    @property
    def limit(self) -> int:
        """Requests that may be in flight now, at least 1."""
        return int(self._limit)

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """Hold one request's place; what the block raises is learned from."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._taken < self.limit)
            self._taken += 1
        began = self._clock()
        try:
            yield
        except Throttled:
            if began >= self._calm_from:
                self._limit = max(1.0, self._limit * _LESS)
                self._calm_from = self._clock() + _CALM_S
            raise
        else:
            self._limit = min(self._most, self._limit + 1 / self._limit)
        finally:
            await asyncio.shield(self._leave())

    async def _leave(self) -> None:
        async with self._changed:
            self._taken -= 1
            self._changed.notify_all()

"""A limit on concurrent requests to the object store, lowered when the store throttles."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from services.core.errors import Throttled

_DECREASE_FACTOR: Final = 0.5
_COOLDOWN_S: Final = 1.0
"""Pause after a reduction. Throttled requests that began before its end do not reduce the limit again."""


class AdaptiveConcurrency:
    """Bounds requests in flight: halved by each `Throttled`, and one more for each full round of successes.

    Additive increase, multiplicative decrease (Chiu and Jain, 1989), as in TCP. For use from one event loop.
    """

    def __init__(self, max_in_flight: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`max_in_flight`: the initial and highest limit."""
        self._max_in_flight = max_in_flight
        self._limit = float(max_in_flight)
        self._clock = clock
        self._in_flight = 0
        self._cooldown_until = float("-inf")
        self._changed = asyncio.Condition()

    @property
    def limit(self) -> int:
        """Requests that may be in flight now, at least 1."""
        return int(self._limit)

    @asynccontextmanager
    async def request(self) -> AsyncIterator[None]:
        """Count one request as in flight. A `Throttled` that the block raises lowers the limit; success raises it."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._in_flight < self.limit)
            self._in_flight += 1
        began = self._clock()
        try:
            yield
        except Throttled:
            if began >= self._cooldown_until:
                self._limit = max(1.0, self._limit * _DECREASE_FACTOR)
                self._cooldown_until = self._clock() + _COOLDOWN_S
            raise
        else:
            self._limit = min(self._max_in_flight, self._limit + 1 / self._limit)
        finally:
            await asyncio.shield(self._leave())

    async def _leave(self) -> None:
        async with self._changed:
            self._in_flight -= 1
            self._changed.notify_all()

"""A byte budget that limits the memory of the images in flight."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class ByteBudget:
    """Grants up to `limit` bytes at a time, in the order of the requests. Use it from one event loop.

    Because of the order, small requests cannot delay a large one forever.
    """

    def __init__(self, limit: int) -> None:
        """`limit`: bytes, more than zero."""
        if limit <= 0:
            raise ValueError("the limit of a budget must be larger than zero")
        self.limit = limit
        self._free = limit
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def reserve(self, size: int) -> AsyncIterator[None]:
        """Hold `size` bytes while the block runs. A size above the limit holds the whole limit."""
        size = min(max(size, 0), self.limit)
        await self._acquire(size)
        try:
            yield
        finally:
            self._release(size)

    async def _acquire(self, size: int) -> None:
        if not self._waiting and size <= self._free:
            self._free -= size
            return
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = (size, granted)
        self._waiting.append(waiter)
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self._release(size)  # the bytes were granted just before the cancellation
            else:
                if waiter in self._waiting:
                    self._waiting.remove(waiter)
                self._wake()  # smaller requests behind it may fit now
            raise

    def _release(self, size: int) -> None:
        self._free += size
        self._wake()

    def _wake(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free:
            size, granted = self._waiting.popleft()
            if not granted.cancelled():
                self._free -= size
                granted.set_result(None)

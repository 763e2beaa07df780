"""A byte budget that limits the memory of the images in flight."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class ByteBudget:
    """Grants up to `limit_bytes` at a time, in the order of the requests. Use it from one event loop.

    A request waits until its bytes are free; the gateway's BodyMemory refuses instead. Because of the order, small
    requests cannot delay a large one forever.
    """

    def __init__(self, limit_bytes: int) -> None:
        """`limit_bytes`: more than zero."""
        if limit_bytes <= 0:
            raise ValueError("the limit of a budget must be larger than zero")
        self.limit_bytes = limit_bytes
        self._free_bytes = limit_bytes
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def reserve(self, size_bytes: int) -> AsyncIterator[None]:
        """Hold `size_bytes` bytes while the block runs. A size above the limit holds the whole limit."""
        size_bytes = min(max(size_bytes, 0), self.limit_bytes)
        await self._acquire(size_bytes)
        try:
            yield
        finally:
            self._release(size_bytes)

    async def _acquire(self, size_bytes: int) -> None:
        if not self._waiting and size_bytes <= self._free_bytes:
            self._free_bytes -= size_bytes
            return
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = (size_bytes, granted)
        self._waiting.append(waiter)
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self._release(size_bytes)  # the bytes were granted just before the cancellation
            else:
                if waiter in self._waiting:
                    self._waiting.remove(waiter)
                self._wake()  # smaller requests behind it may fit now
            raise

    def _release(self, size_bytes: int) -> None:
        self._free_bytes += size_bytes
        self._wake()

    def _wake(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free_bytes:
            size_bytes, granted = self._waiting.popleft()
            if not granted.cancelled():
                self._free_bytes -= size_bytes
                granted.set_result(None)

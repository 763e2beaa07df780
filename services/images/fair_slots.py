"""A limited number of slots that tenants take in turn: a tenant's many waiting calls delay another by one of them."""

import asyncio
from collections import deque


class FairSlots:
    """Slots for calls. Use it from one event loop.

    If all are taken, callers wait. Each free slot goes to the next tenant in turn, and to that tenant's oldest call.
    """

    def __init__(self, slots: int) -> None:
        self._free = slots
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    async def acquire(self, tenant: str) -> None:
        """Wait for a slot. The caller must call `release` once."""
        if self._free and not self._waiting:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release()  # it got a slot and was cancelled at the same time
            raise

    def release(self) -> None:
        """Give a slot back, to the call that is next."""
        while self._waiting:
            tenant = next(iter(self._waiting))
            calls = self._waiting.pop(tenant)
            turn = calls.popleft()
            if calls:
                self._waiting[tenant] = calls  # at the end: the other tenants come first
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

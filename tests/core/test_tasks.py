"""Background tasks end when they are cancelled."""

import asyncio
from contextlib import suppress

from services.core.tasks import cancel_and_wait


async def test_cancel_and_wait_task_that_swallows_cancellations_ends() -> None:
    """`asyncio.wait_for` in Python 3.11 swallows a cancellation that arrives as its awaitable completes."""
    began = asyncio.Event()

    async def work() -> None:
        for _ in range(2):
            began.set()
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
        await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await began.wait()
    async with asyncio.timeout(10):
        await cancel_and_wait(task)
    assert task.cancelled()

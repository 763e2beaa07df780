"""What runs in the background ends."""

import asyncio
from contextlib import suppress

from services.core.tasks import ended


async def test_a_task_that_takes_a_cancellation_for_its_own_ends() -> None:
    """As `asyncio.wait_for` does in Python 3.11 when what it waits for is done at the same moment."""
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
        await ended(task)
    assert task.cancelled()

"""Background tasks end when they are cancelled."""

import asyncio
from contextlib import AsyncExitStack, suppress

import pytest

from services.core.tasks import cancel_and_wait, close_on_error


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


async def test_close_on_error_closes_stack_only_after_an_error() -> None:
    closed: list[str] = []
    async with AsyncExitStack() as stack:
        stack.callback(closed.append, "kept")
        async with close_on_error(stack):
            pass
        assert closed == []
    failed = AsyncExitStack()
    failed.callback(closed.append, "failed")
    with pytest.raises(ZeroDivisionError):
        async with close_on_error(failed):
            raise ZeroDivisionError
    assert closed == ["kept", "failed"]

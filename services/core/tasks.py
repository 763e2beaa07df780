"""Cancels background tasks, and closes resources if a start fails."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

_RETRY_S: Final = 1.0


async def cancel_and_wait(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait for it. Cancels again each second, because a library may swallow a `CancelledError`."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=_RETRY_S)


@asynccontextmanager
async def close_on_error(stack: AsyncExitStack) -> AsyncIterator[None]:
    """Close `stack` if the block raises. After the block, the caller closes it."""
    try:
        yield
    except BaseException:
        await stack.aclose()
        raise

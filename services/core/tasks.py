"""Background tasks."""

import asyncio
from typing import Any, Final

_RETRY_S: Final = 1.0


async def cancel_and_wait(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait for it. Cancels again each second, because a library may swallow a `CancelledError`."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=_RETRY_S)

"""What a process does beside what it is asked for."""

import asyncio
from typing import Any, Final

_AGAIN_S: Final = 1.0


async def ended(task: asyncio.Task[Any]) -> None:
    """End a task. It is told so until it obeys: a library on its way may take one cancellation for its own."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=_AGAIN_S)

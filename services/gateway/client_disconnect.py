"""Cancels work for clients that have closed their connection."""

import asyncio
from collections.abc import Awaitable
from typing import Final, Protocol, TypeVar

from services.core.tasks import cancel_and_wait
from services.gateway.problems import HttpProblem

_POLL_S: Final = 0.1

T = TypeVar("T")


class IsDisconnected(Protocol):
    """Returns whether the client has closed the connection: `Request.is_disconnected`."""

    def __call__(self) -> Awaitable[bool]: ...


async def cancel_on_disconnect(work: Awaitable[T], is_disconnected: IsDisconnected) -> T:
    """Return the result of `work`. If the client closes the connection before, cancel `work`.

    Raises:
        HttpProblem: the client has closed the connection. No client reads this, but the metric of refused requests
            counts it as `malformed`.
    """
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=_POLL_S)
            if not task.done() and await is_disconnected():
                raise HttpProblem("malformed", "the connection was closed before the response")
        return task.result()
    finally:
        await cancel_and_wait(task)

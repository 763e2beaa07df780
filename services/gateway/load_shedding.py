"""Judging for someone who waits: bounded in number and in time, and before all streams."""

import asyncio
from collections.abc import Awaitable
from typing import Final, Protocol, TypeVar

from services.core.messages import Verdict
from services.core.settings import Settings
from services.core.tasks import cancel_and_wait
from services.core.values import Detail
from services.gateway.image_inputs import Image
from services.gateway.problems import HttpProblem
from services.moderation.moderator import Moderator

_WATCH_S: Final = 0.1

T = TypeVar("T")


class LoadShedder:
    """Judges images one by one for all requests of this gateway."""

    def __init__(self, moderator: Moderator, settings: Settings) -> None:
        self._moderator = moderator
        self._limit = settings.gateway_in_flight
        self._deadline_s = settings.gateway_deadline_s
        self.in_flight = 0

    async def judge(self, image: Image, detail: Detail = "verdict") -> Verdict:
        """The verdict on one image.

        Raises:
            HttpProblem: the gateway has as much to do as it can, or it took longer than the deadline.
            Unjudgeable: it can never be judged.
        """
        if self.in_flight >= self._limit:
            raise HttpProblem("overloaded", f"{self._limit} images are being judged here, which is as many as can be")
        self.in_flight += 1
        try:
            async with asyncio.timeout(self._deadline_s):
                judging = self._moderator.judge(
                    image.request, upload=image.upload, priority="interactive", detail=detail
                )
                return (await judging).verdict
        except TimeoutError:
            raise HttpProblem(
                "unavailable", f"there was no verdict within {self._deadline_s:g} s; try again", retry_after_s=5
            ) from None
        finally:
            self.in_flight -= 1


async def cancel_on_disconnect(work: Awaitable[T], is_disconnected: "IsDisconnected") -> T:
    """The result of `work`, which is cancelled when nobody waits for it any more.

    Raises:
        HttpProblem: the client has gone. Nobody reads it.
    """
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=_WATCH_S)
            if not task.done() and await is_disconnected():
                raise HttpProblem("malformed", "the connection ended before the answer was there")
        return task.result()
    finally:
        await cancel_and_wait(task)


class IsDisconnected(Protocol):
    """Whether the client has gone: `Request.is_disconnected`."""

    def __call__(self) -> Awaitable[bool]: ...

"""Limits how many images the gateway judges at a time. Images over the limit are refused at once (load shedding)."""

import asyncio

from services.core.messages import Verdict
from services.core.settings import Settings
from services.core.values import Detail
from services.gateway.problems import HttpProblem
from services.gateway.submitted_images import SubmittedImage
from services.moderation.moderator import Moderator


class BoundedModerator:
    """Judges the images of all requests of this gateway, up to a limit. They have priority over all streams."""

    def __init__(self, moderator: Moderator, settings: Settings) -> None:
        self._moderator = moderator
        self._limit = settings.gateway_in_flight
        self._deadline_s = settings.gateway_deadline_s
        self.in_flight = 0

    async def judge(self, image: SubmittedImage, detail: Detail = "verdict") -> Verdict:
        """Judge one image. Returns its verdict.

        Raises:
            HttpProblem: the gateway is at its limit, or there is no verdict within the deadline.
            Unjudgeable: the image can never be judged.
        """
        if self.in_flight >= self._limit:
            raise HttpProblem(
                "overloaded", f"the gateway is at its limit of {self._limit} concurrent images; try again later"
            )
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

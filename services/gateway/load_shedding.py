"""Limits how many images the gateway judges at a time. Images over the limit are refused at once (load shedding).

One API key gets at most a quarter of the places, so that it cannot keep others out.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

from services.core.messages import Verdict
from services.core.settings import Settings
from services.core.tenancy import Scope
from services.core.values import Detail
from services.gateway.problems import HttpProblem
from services.gateway.submitted_images import SubmittedImage
from services.moderation.moderator import Moderator

_KEY_SHARE: Final = 4
"""One API key gets at most this fraction (1/4) of the places, and at least one place."""


class BoundedModerator:
    """Judges the images of all requests of this gateway, up to a limit. They have priority over all streams."""

    def __init__(self, moderator: Moderator, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._moderator = moderator
        self._limit = settings.gateway_in_flight
        self._deadline_s = settings.gateway_deadline_s
        self._key_limit = max(1, self._limit // _KEY_SHARE)
        self._clock = clock
        self._in_flight_of = Counter[str]()
        self.in_flight = 0
        self.judged_at = float("-inf")
        """When the guard last judged an image, by the clock."""

    async def judge(self, image: SubmittedImage, key_id: str, scope: Scope, detail: Detail = "verdict") -> Verdict:
        """Judge one image of an API key, which may use the objects and policies of `scope`. Returns its verdict.

        Raises:
            HttpProblem: the gateway or the API key is at its limit, or there is no verdict within the deadline.
            Unjudgeable: the image can never be judged.
        """
        if self.in_flight >= self._limit:
            raise HttpProblem(
                "overloaded", f"the gateway is at its limit of {self._limit} concurrent images; try again later"
            )
        if self._in_flight_of[key_id] >= self._key_limit:
            raise HttpProblem(
                "too-many-at-once",
                f"this API key may have {self._key_limit} images in flight at a time; try again when one is judged",
            )
        self.in_flight += 1
        self._in_flight_of[key_id] += 1
        try:
            async with asyncio.timeout(self._deadline_s):
                judging = self._moderator.judge(
                    image.request, scope, upload=image.upload, priority="interactive", detail=detail
                )
                verdict = (await judging).verdict
                if verdict.model is not None:
                    self.judged_at = self._clock()
                return verdict
        except TimeoutError:
            raise HttpProblem(
                "unavailable", f"there was no verdict within {self._deadline_s:g} s; try again", retry_after_s=5
            ) from None
        finally:
            self.in_flight -= 1
            self._in_flight_of[key_id] -= 1
            if not self._in_flight_of[key_id]:
                del self._in_flight_of[key_id]

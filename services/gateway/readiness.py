"""Readiness of a gateway: API keys and policies are known, and the guard has judged a test image."""

import asyncio
import logging
from typing import Final, Self

from services.core.errors import SluiceError
from services.core.messages import Submission
from services.core.probe_image import draw_probe_image
from services.core.tasks import cancel_and_wait
from services.core.tenancy import UNLIMITED
from services.core.values import PreparedImage
from services.gateway.api_key_cache import ApiKeyCache
from services.gateway.load_shedding import BoundedModerator
from services.moderation.ports import GuardClient, ImagePreparer, PolicySource

PROBE_PERIOD_S: Final = 5.0
_RETRY_PERIOD_S: Final = 1.0
_PROBE_DEADLINE_S: Final = 20.0

log = logging.getLogger(__name__)


class Readiness:
    """Probes every few seconds all that a request needs. To be used as an async context manager."""

    def __init__(
        self,
        *,
        policies: PolicySource,
        preparer: ImagePreparer,
        guard: GuardClient,
        keys: ApiKeyCache,
        moderator: BoundedModerator,
        deadline_s: float = _PROBE_DEADLINE_S,
    ) -> None:
        """`moderator` says when the guard last judged an image of a request."""
        self._moderator = moderator
        self._deadline_s = deadline_s
        self._policies = policies
        self._preparer = preparer
        self._guard = guard
        self._keys = keys
        self._image: PreparedImage | None = None
        self.not_ready_reason = "the gateway is starting"
        """Why the gateway cannot answer requests. Empty if it can."""

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._probe_loop())
        return self

    async def __aexit__(self, *_: object) -> None:
        await cancel_and_wait(self._task)

    async def probe(self) -> str:
        """Judge a test image now. Returns why the gateway cannot answer requests, or an empty text."""
        try:
            judged_before = self._moderator.judged_at
            async with asyncio.timeout(self._deadline_s):
                self._keys.raise_if_stale()
                # Chooses the default policy. Nothing is fetched, so the object need not exist.
                choice = await self._policies.choose(Submission(id="readiness", uri="s3://none/none"), UNLIMITED)
                if self._image is None:
                    self._image = await self._preparer.prepare(draw_probe_image())
                await self._guard.assess_each(self._image, [choice.policy], "score", "interactive")
        except TimeoutError:
            # A guard that judges images of requests is only busy. Without traffic, Kubernetes would make it worse.
            if self._moderator.judged_at > judged_before:
                return ""
            return f"the guard did not judge a test image within {self._deadline_s:g} s"
        except SluiceError as error:
            return str(error)
        return ""

    async def refresh(self) -> None:
        """Probe now, and keep the result in `not_ready_reason`."""
        try:
            reason = await self.probe()
        except Exception:
            log.exception("the readiness probe failed; retrying in %g s", _RETRY_PERIOD_S)
            reason = "the gateway failed; its log has the error"
        if reason != self.not_ready_reason:
            log.info("the gateway is %s", f"not ready: {reason}" if reason else "ready")
        self.not_ready_reason = reason

    async def _probe_loop(self) -> None:
        while True:
            await self.refresh()
            await asyncio.sleep(_RETRY_PERIOD_S if self.not_ready_reason else PROBE_PERIOD_S)

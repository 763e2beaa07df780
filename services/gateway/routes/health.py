"""Whether this gateway lives, and whether it can answer: the guard has judged an image, policies and keys are known."""

import asyncio
import io
import logging
from typing import Final, Self

from fastapi import APIRouter
from fastapi.responses import Response
from PIL import Image
from pydantic_core import to_json

from services.core.errors import SluiceError
from services.core.messages import Submission
from services.core.tasks import cancel_and_wait
from services.core.values import PreparedImage
from services.gateway.api_keys import ApiKeyCache
from services.gateway.problems import HttpProblem
from services.moderation.ports import GuardClient, ImagePreparer, PolicySource

_EVERY_S: Final = 5.0
_EVERY_S_NOT_READY: Final = 1.0
_TRY_S: Final = 20.0

log = logging.getLogger(__name__)


class Readiness:
    """Tries, every few seconds, what a request needs. To be used as an async context manager."""

    def __init__(
        self, *, policies: PolicySource, preparer: ImagePreparer, guard: GuardClient, keys: ApiKeyCache
    ) -> None:
        self._policies = policies
        self._preparer = preparer
        self._guard = guard
        self._keys = keys
        self._image: PreparedImage | None = None
        self.not_ready_reason = "the gateway is starting"
        """What keeps it from answering; empty when nothing does."""

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        await cancel_and_wait(self._task)

    async def probe(self) -> str:
        """Try it now; what is wrong, or nothing."""
        try:
            async with asyncio.timeout(_TRY_S):
                self._keys.check()
                choice = await self._policies.choose(Submission(id="readiness", uri="s3://none/none"))
                if self._image is None:
                    self._image = await self._preparer.prepare(_picture())
                await self._guard.assess_each(self._image, [choice.policy], "score", "interactive")
        except TimeoutError:
            return f"the guard has not judged an image within {_TRY_S:g} s"
        except SluiceError as error:
            return str(error)
        return ""

    async def _watch(self) -> None:
        while True:
            try:
                not_ready_reason = await self.probe()
            except Exception:
                log.exception("readiness could not be looked at")
                not_ready_reason = "the gateway failed; its log says why"
            if not_ready_reason != self.not_ready_reason:
                log.info("the gateway is %s", f"not ready: {not_ready_reason}" if not_ready_reason else "ready")
            self.not_ready_reason = not_ready_reason
            await asyncio.sleep(_EVERY_S_NOT_READY if not_ready_reason else _EVERY_S)


def router(readiness: Readiness) -> APIRouter:
    """The routes. They need no key, and say little."""
    routes = APIRouter(tags=["health"])

    @routes.get("/healthz", summary="Whether the process lives")
    async def healthz() -> Response:
        return Response(to_json({"status": "ok"}), media_type="application/json")

    @routes.get("/readyz", summary="Whether requests can be answered")
    async def readyz() -> Response:
        if readiness.not_ready_reason:
            raise HttpProblem("unavailable", "not ready: something that is needed is away", retry_after_s=_EVERY_S)
        return Response(to_json({"status": "ready"}), media_type="application/json")

    return routes


def _picture() -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()

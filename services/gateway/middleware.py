"""The ASGI middleware of the gateway."""

import asyncio
import time
from collections.abc import Callable
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.core import telemetry
from services.core.settings import Settings

_DISCARD_S: Final = 5.0
_MAX_DISCARDS: Final = 64
_DISCARD_BODY_LIMITS: Final = 4
"""Of one refused body, at most this many times SLUICE_GATEWAY_BODY_LIMIT_BYTES are received and discarded."""


class RequestMetricsMiddleware:
    """Counts requests by route and status, and measures how long they take."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began = time.perf_counter()
        status = 500

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note_status)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            telemetry.GATEWAY_REQUESTS.inc(1, {"route": route, "status": str(status)})
            telemetry.GATEWAY_SECONDS.observe(time.perf_counter() - began, {"route": route})


class DiscardUnreadBodyMiddleware:
    """Discards the rest of a body that was refused unread, then closes the connection.

    Without this, a client that is still sending sees a reset connection instead of the response. The time, the size
    and the number of concurrent discards are limited.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._limit_bytes = _DISCARD_BODY_LIMITS * settings.gateway_body_limit_bytes
        self._deadline_s = min(_DISCARD_S, settings.gateway_body_deadline_s)
        self._discarding = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        is_unread = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"

        async def receive_and_note_end() -> Message:
            nonlocal is_unread
            message = await receive()
            if message["type"] == "http.disconnect" or not message.get("more_body"):
                is_unread = False
            return message

        async def discard_and_send(message: Message) -> None:
            if message["type"] == "http.response.start" and is_unread:
                if b"expect" not in headers:
                    await self._discard(receive_and_note_end, lambda: is_unread)
                if is_unread:
                    message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        return await self._app(scope, receive_and_note_end, discard_and_send)

    async def _discard(self, receive: Receive, is_unread: Callable[[], bool]) -> None:
        if self._discarding >= _MAX_DISCARDS:
            return
        self._discarding += 1
        try:
            discarded_bytes = 0
            async with asyncio.timeout(self._deadline_s):
                while is_unread() and discarded_bytes < self._limit_bytes:
                    discarded_bytes += len((await receive()).get("body", b""))
        except TimeoutError:
            pass
        finally:
            self._discarding -= 1

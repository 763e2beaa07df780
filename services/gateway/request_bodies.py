"""Bodies of requests: never more of them, never longer than allowed, and all of them together in bounded memory.

What a client says about its body is not believed: bytes are counted as they come. Nothing is read before it is known
who asks, so that a slow upload costs its own API key and nobody else.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from pydantic_core import from_json
from python_multipart.exceptions import FormParserError
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.core.settings import Settings
from services.gateway.problems import HttpProblem

_SHARE: Final = 4
"""One API key gets this part of the memory for bodies, so that its neighbours always have some."""
_DRAIN_S: Final = 5.0
_DRAINS: Final = 64
_DRAIN_LIMITS: Final = 4
"""Times the limit on bodies that are received and dropped of one that was refused."""
_FIELD_BYTES: Final = 64 << 10
_FIELDS: Final = 20


class BodyMemory:
    """The bytes of all bodies that are held now. What does not fit is refused: waiting would hold what others need."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._used = Counter[str]()

    @property
    def used(self) -> int:
        return sum(self._used.values())

    @contextmanager
    def lease(self, owner: str) -> "Iterator[MemoryLease]":
        """What one request holds, released when the block ends."""
        lease = MemoryLease(self, owner)
        try:
            yield lease
        finally:
            lease.release()

    def reserve(self, owner: str, size: int) -> None:
        """
        Raises:
            HttpProblem: there is no room for it.
        """
        if self._used[owner] + size > self._limit // _SHARE:
            raise HttpProblem(
                "too-many-at-once", "the bodies of this API key's requests take too much memory at a time"
            )
        if self.used + size > self._limit:
            raise HttpProblem("overloaded", "the bodies of all requests take too much memory at a time; try again")
        self._used[owner] += size

    def release(self, owner: str, size: int) -> None:
        self._used[owner] -= size
        if not self._used[owner]:
            del self._used[owner]


class MemoryLease:
    """The bytes that one request holds."""

    def __init__(self, memory: BodyMemory, owner: str) -> None:
        self._memory = memory
        self._owner = owner
        self._held = 0

    def reserve(self, size: int) -> None:
        """Hold more; raises what `BodyMemory.reserve` raises."""
        self._memory.reserve(self._owner, size)
        self._held += size

    def release(self) -> None:
        self._memory.release(self._owner, self._held)
        self._held = 0


@dataclass(frozen=True, slots=True)
class Form:
    """A multipart body: at most one file, and its other fields."""

    file: bytes | None
    fields: dict[str, str]


class BodyReader:
    """Reads bodies within their limits."""

    def __init__(self, settings: Settings) -> None:
        self._limit = settings.gateway_body_limit_bytes
        self._deadline_s = settings.gateway_body_deadline_s

    async def read(self, request: Request, lease: MemoryLease) -> bytes:
        """The whole body.

        Raises:
            HttpProblem: it is too large, too slow, or there is no memory for it now.
        """
        body = bytearray()
        async for chunk in self._chunks(request, lease):
            body += chunk
        return bytes(body)

    async def json(self, request: Request, lease: MemoryLease) -> Any:
        """The body as JSON (RFC 8259). Raises HttpProblem as `read`, and where it is something else."""
        _expect(request, "application/json")
        return decoded(await self.read(request, lease))

    async def form(self, request: Request, lease: MemoryLease) -> Form:
        """The body as multipart/form-data. Raises HttpProblem as `read`, and where it is something else."""
        _expect(request, "multipart/form-data")
        parser = MultiPartParser(
            request.headers,
            self._chunks(request, lease),
            max_files=1,
            max_fields=_FIELDS,
            max_part_size=_FIELD_BYTES,
        )
        parser.spool_max_size = self._limit  # memory is bounded already; nothing of an image is written to a disk
        try:
            form = await parser.parse()
        except (MultiPartException, FormParserError, KeyError, ValueError) as error:
            raise HttpProblem("malformed", f"the multipart body cannot be read: {error}") from None
        try:
            fields: dict[str, str] = {}
            file: bytes | None = None
            for name, value in form.multi_items():
                if isinstance(value, str):
                    fields[name] = value
                elif name != "file":
                    raise HttpProblem("invalid", f"the file has to be in the part `file`, not {name!r}", param=name)
                else:
                    file = await value.read()
            return Form(file, fields)
        finally:
            await form.close()

    async def _chunks(self, request: Request, lease: MemoryLease) -> AsyncGenerator[bytes, None]:
        """The bytes as they come, counted."""
        if (length := request.headers.get("content-length", "0")).isdigit() and int(length) > self._limit:
            raise self._too_large()
        size = 0
        stream = request.stream()
        deadline = asyncio.get_running_loop().time() + self._deadline_s
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    chunk = await anext(stream, None)
            except TimeoutError:
                raise HttpProblem(
                    "body-too-slow", f"the body did not arrive within {self._deadline_s:g} s", retry_after_s=1
                ) from None
            except ClientDisconnect:
                raise HttpProblem("malformed", "the connection ended before the body did") from None
            if chunk is None:
                return
            size += len(chunk)
            if size > self._limit:
                raise self._too_large()
            lease.reserve(len(chunk))
            yield chunk

    def _too_large(self) -> HttpProblem:
        return HttpProblem(
            "body-too-large", f"the body has more than {self._limit} bytes (SLUICE_GATEWAY_BODY_LIMIT_BYTES)"
        )


def decoded(body: bytes | str) -> Any:
    """Decode one JSON text.

    Raises:
        HttpProblem: it is none.
    """
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise HttpProblem("malformed", f"this is not JSON in UTF-8: {error}") from None


def is_form(request: Request) -> bool:
    return _media_type(request) == "multipart/form-data"


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _expect(request: Request, media_type: str) -> None:
    given = _media_type(request)
    if given != media_type:
        raise HttpProblem("unsupported-media-type", f"the body has to be {media_type}, not {given or 'of no type'}")


class DrainUnreadBodyMiddleware:
    """ASGI middleware: what happens to a body that was refused unread.

    A client that still sends sees a reset connection instead of the answer. So the rest is received and dropped, for a
    few seconds and for a bounded number of requests at a time; then the connection is closed.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._limit = _DRAIN_LIMITS * settings.gateway_body_limit_bytes
        self._seconds = min(_DRAIN_S, settings.gateway_body_deadline_s)
        self._draining = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        left = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"

        async def watched() -> Message:
            nonlocal left
            message = await receive()
            if message["type"] == "http.disconnect" or not message.get("more_body"):
                left = False
            return message

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start" and left:
                if b"expect" not in headers:
                    await self._drain(watched, lambda: left)
                if left:
                    message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        return await self._app(scope, watched, answer)

    async def _drain(self, receive: Receive, left: Any) -> None:
        if self._draining >= _DRAINS:
            return
        self._draining += 1
        try:
            dropped = 0
            async with asyncio.timeout(self._seconds):
                while left() and dropped < self._limit:
                    dropped += len((await receive()).get("body", b""))
        except TimeoutError:
            pass
        finally:
            self._draining -= 1

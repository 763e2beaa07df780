"""Reads request bodies: JSON, multipart forms and others, within limits of size, time and memory.

The header `Content-Length` is not trusted: bytes are counted as they arrive. A body is read only after its request was
admitted, so a slow upload uses up the limits of its own API key and of no other.
"""

import asyncio
import re
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Final

from pydantic_core import from_json
from python_multipart.exceptions import FormParserError
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from services.core.settings import Settings
from services.gateway.body_memory import MemoryLease
from services.gateway.problems import HttpProblem

_FIELD_LIMIT_BYTES: Final = 64 << 10
_MAX_FIELDS: Final = 20
_JSON_LIMIT_BYTES: Final = 1 << 20
"""Largest JSON body without a `data:` URL within its first bytes. SLUICE_GATEWAY_BODY_LIMIT_BYTES may be smaller."""
_JSON_MAX_VALUES: Final = 10_000
"""A JSON body may have so many commas and opening brackets. Each value takes some 100 bytes when it is decoded."""
_LARGE_JSON_BYTES: Final = 512 << 10
"""Larger JSON is decoded in a thread."""
_DATA_URL: Final = re.compile(rb"data:", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Form:
    """A multipart body: at most one file, and its other fields."""

    file: bytes | None
    fields: dict[str, str]


class BodyReader:
    """Reads bodies within their limits."""

    def __init__(self, settings: Settings) -> None:
        self._limit_bytes = settings.gateway_body_limit_bytes
        self._deadline_s = settings.gateway_body_deadline_s

    async def read(self, request: Request, lease: MemoryLease) -> bytes:
        """Read the whole body.

        Raises:
            HttpProblem: the body is too large or too slow, or there is no memory for it now.
        """
        body = bytearray()
        async for chunk in self._read_chunks(request, lease):
            body += chunk
        return bytes(body)

    async def read_json(self, request: Request, lease: MemoryLease) -> Any:
        """Read the body as JSON (RFC 8259).

        Raises:
            HttpProblem: as `read`, or the body is not JSON or has too many values.
        """
        _require_media_type(request, "application/json")
        return await self.read_any_json(request, lease)

    async def read_any_json(self, request: Request, lease: MemoryLease, *, if_empty: Any = None) -> Any:
        """Read the body as JSON, whatever its media type. Returns `if_empty` for an empty body, unless it is None.

        Values are counted before they are decoded, so that they take about as much memory as the body.

        Raises:
            HttpProblem: as `read`, or the body is not JSON or has too many values.
        """
        body = bytearray()
        values = 0
        async for chunk in self._read_chunks(request, lease):
            is_first_over = len(body) <= _JSON_LIMIT_BYTES < len(body) + len(chunk)
            body += chunk
            values += chunk.count(b",") + chunk.count(b"[") + chunk.count(b"{")
            if values > _JSON_MAX_VALUES:
                raise HttpProblem("body-too-large", f"the JSON has more than {_JSON_MAX_VALUES} values")
            if is_first_over and not _DATA_URL.search(body):
                raise HttpProblem(
                    "body-too-large", f"a JSON body without a data: URL may have at most {_JSON_LIMIT_BYTES} bytes"
                )
        if not body and if_empty is not None:
            return if_empty
        if len(body) <= _LARGE_JSON_BYTES:
            return decode_body_json(body)
        if not body.isascii() or b"\\u" in body:
            lease.reserve(3 * len(body))  # one wide character makes all characters of its string wide
        return await asyncio.to_thread(decode_body_json, body)

    async def read_form(self, request: Request, lease: MemoryLease) -> Form:
        """Read the body as multipart/form-data.

        Raises:
            HttpProblem: as `read`, or the body is not such a form, or has other files than one in the part `file`.
        """
        _require_media_type(request, "multipart/form-data")
        parser = MultiPartParser(
            request.headers,
            self._read_chunks(request, lease),
            max_files=1,
            max_fields=_MAX_FIELDS,
            max_part_size=_FIELD_LIMIT_BYTES,
        )
        parser.spool_max_size = self._limit_bytes  # the lease limits the memory, so no image is written to a disk
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
                    raise HttpProblem("invalid", f"the file must be in the part `file`, not {name!r}", param=name)
                else:
                    file = await value.read()
            return Form(file, fields)
        finally:
            await form.close()

    async def _read_chunks(self, request: Request, lease: MemoryLease) -> AsyncGenerator[bytes, None]:
        """Yield the body as it arrives, and reserve memory for it."""
        if (length := request.headers.get("content-length", "0")).isdigit() and int(length) > self._limit_bytes:
            raise self._build_too_large()
        size_bytes = 0
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
                raise HttpProblem("malformed", "the connection was closed before the end of the body") from None
            if chunk is None:
                return
            size_bytes += len(chunk)
            if size_bytes > self._limit_bytes:
                raise self._build_too_large()
            lease.reserve(len(chunk))
            yield chunk

    def _build_too_large(self) -> HttpProblem:
        return HttpProblem(
            "body-too-large", f"the body has more than {self._limit_bytes} bytes (SLUICE_GATEWAY_BODY_LIMIT_BYTES)"
        )


def decode_body_json(body: bytes | bytearray | str) -> Any:
    """Decode one JSON text.

    Raises:
        HttpProblem: the text is not JSON.
    """
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise HttpProblem("malformed", f"the text is not JSON in UTF-8: {error}") from None


def is_form(request: Request) -> bool:
    """Return whether the request says that its body is multipart/form-data."""
    return _media_type(request) == "multipart/form-data"


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _require_media_type(request: Request, media_type: str) -> None:
    given = _media_type(request)
    if given != media_type:
        found = f"the header Content-Type says {given}" if given else "the header Content-Type is missing"
        raise HttpProblem("unsupported-media-type", f"the body must be {media_type}; {found}")

"""A light S3 server that misbehaves on demand.

    python -m tests.faults.s3 PORT PICTURES

It knows what Sluice asks of S3: GetObject (also with If-Match), PutObject (also with If-None-Match) and ListObjectsV2.
In the bucket `uploads`, a key that was not put stands for the file in the folder PICTURES that its first segment names,
so that thousands of objects need no upload. `PUT /?fault=MODE` sets what goes wrong from then on.
"""

import argparse
import asyncio
import hashlib
import random
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, Literal, get_args
from xml.sax.saxutils import escape

from aiohttp import web

Mode = Literal["pass", "slow", "throttled", "erroneous", "hanging", "broken_off"]

BUCKET: Final = "uploads"
_PER_S_WHEN_THROTTLED: Final = 20
_SLOW_S: Final = (0.3, 1.5)
_SHARE_OF_ERRORS: Final = 0.8


class Server:
    """The objects, and what goes wrong with them at the moment."""

    def __init__(self, pictures: Path) -> None:
        self._pictures = {file.name: file.read_bytes() for file in pictures.iterdir()}
        self._objects: dict[tuple[str, str], bytes] = {}
        self._mode: Mode = "pass"
        self._changed = asyncio.Event()
        self._second, self._in_second = 0, 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Any request: the fault that is on, else what S3 says."""
        if "fault" in request.query:
            return self._set_mode(request.query["fault"])
        bucket, _, key = request.path.removeprefix("/").partition("/")
        body = await request.read()
        spoiled = await self._spoiled(request)
        if spoiled is not None:
            return spoiled
        if request.method == "PUT":
            return self._put(bucket, key, body, only_new=request.headers.get("If-None-Match") == "*")
        if not key:
            return self._listing(bucket, request)
        return await self._get(bucket, key, request)

    def _set_mode(self, mode: str) -> web.Response:
        if mode not in get_args(Mode):
            return web.Response(status=400)
        self._mode = mode  # type: ignore[assignment]  # checked just now
        self._changed.set()
        self._changed = asyncio.Event()
        return web.Response()

    async def _spoiled(self, request: web.Request) -> web.StreamResponse | None:
        mode = self._mode
        if mode == "slow":
            await asyncio.sleep(random.uniform(*_SLOW_S))
        elif mode == "throttled":
            now = int(time.monotonic())
            self._second, self._in_second = now, self._in_second + 1 if now == self._second else 1
            if self._in_second > _PER_S_WHEN_THROTTLED:
                return _error(503, "SlowDown", "Please reduce your request rate.")
        elif mode == "erroneous" and random.random() < _SHARE_OF_ERRORS:
            return _error(500, "InternalError", "We encountered an internal error. Please try again.")
        elif mode == "hanging":
            await self._changed.wait()
            _break_off(request)
        return None

    def _put(self, bucket: str, key: str, body: bytes, *, only_new: bool) -> web.Response:
        if only_new and (bucket, key) in self._objects:
            return _error(412, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold")
        self._objects[bucket, key] = body
        return web.Response(headers={"ETag": _etag(body)})

    async def _get(self, bucket: str, key: str, request: web.Request) -> web.StreamResponse:
        body = self._objects.get((bucket, key))
        if body is None and bucket == BUCKET:
            body = self._pictures.get(key.partition("/")[0])
        if body is None:
            return _error(404, "NoSuchKey", "The specified key does not exist.")
        wanted = request.headers.get("If-Match")
        if wanted is not None and wanted != _etag(body):
            return _error(412, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold")
        if self._mode != "broken_off":
            return web.Response(body=body, headers={"ETag": _etag(body)})
        response = web.StreamResponse(headers={"ETag": _etag(body), "Content-Length": str(len(body))})
        await response.prepare(request)
        await response.write(body[: len(body) // 2])
        _break_off(request)
        return response

    def _listing(self, bucket: str, request: web.Request) -> web.Response:
        prefix, delimiter = request.query.get("prefix", ""), request.query.get("delimiter")
        after, limit = request.query.get("continuation-token", ""), int(request.query.get("max-keys", "1000"))
        found = sorted(key for of, key in self._objects if of == bucket and key.startswith(prefix) and key > after)
        folders: dict[str, None] = {}
        if delimiter:
            rest = {key: key.removeprefix(prefix) for key in found}
            folders = {
                prefix + rest[key].split(delimiter)[0] + delimiter: None for key in found if delimiter in rest[key]
            }
            found = [key for key in found if delimiter not in rest[key]]
        page = found[:limit]
        parts = [f"<Name>{escape(bucket)}</Name><KeyCount>{len(page)}</KeyCount><MaxKeys>{limit}</MaxKeys>"]
        parts += [f"<IsTruncated>{'true' if len(found) > limit else 'false'}</IsTruncated>"]
        if len(found) > limit:
            parts.append(f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>")
        parts += [
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self._objects[bucket, key])}</Size></Contents>"
            for key in page
        ]
        parts += [f"<CommonPrefixes><Prefix>{escape(each)}</Prefix></CommonPrefixes>" for each in folders]
        return _xml(200, f"<ListBucketResult>{''.join(parts)}</ListBucketResult>")


def _etag(body: bytes) -> str:
    return f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'


def _xml(status: int, content: str) -> web.Response:
    return web.Response(status=status, content_type="application/xml", text=f'<?xml version="1.0"?>{content}')


def _error(status: int, code: str, message: str) -> web.Response:
    return _xml(status, f"<Error><Code>{code}</Code><Message>{message}</Message></Error>")


def _break_off(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


def _forgiving(
    answer: Callable[[web.Request], Awaitable[web.StreamResponse]],
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Clients that went away meanwhile are no fault of this server."""

    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            return await answer(request)
        except ConnectionError:
            return web.Response(status=499)

    return handle


async def _serve(port: int, pictures: Path) -> None:
    application = web.Application(client_max_size=1 << 26)
    application.router.add_route("*", "/{path:.*}", _forgiving(Server(pictures).answer))
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("pictures", type=Path)
    given = parser.parse_args()
    asyncio.run(_serve(given.port, given.pictures))

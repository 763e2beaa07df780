"""Reads images from S3: only from allowed buckets, within a size limit and a deadline."""

import asyncio
import io
import re
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final, TypeVar

from services.core.errors import Forbidden, NotFound, ObjectChanged, StoreUnavailable, TooLarge
from services.core.messages import ObjectReference
from services.core.s3 import map_s3_errors, s3_client
from services.core.settings import Settings
from services.core.values import StoredObject
from services.images.adaptive_concurrency import AdaptiveConcurrency
from services.images.memory_budget import ByteBudget
from services.images.socket_deadline import SocketDeadline, watch_connections

_CONNECTIONS_LIMIT: Final = 32
_CONNECT_TIMEOUT_S: Final = 5.0
_READ_TIMEOUT_S: Final = 10.0
_GRACE_S: Final = 1.0
"""After its connection was shut down, a thread ends within this time, unless a name lookup hangs."""
_CHUNK_BYTES: Final = 1 << 18
_KEY_LIMIT_BYTES: Final = 1024
_ETAG_PATTERN: Final = re.compile(r"[\x21\x23-\x7e]+")

T = TypeVar("T")


class ObjectStore:
    """One S3 client, its threads, and the memory budget of the images in flight."""

    def __init__(self, settings: Settings) -> None:
        """Take the limits, the endpoint and the allowed buckets from `settings`. boto3 finds the credentials.

        No connection is made until the first read.
        """
        connections = min(settings.in_flight, _CONNECTIONS_LIMIT)
        self.budget = ByteBudget(settings.image_memory_bytes)
        self._buckets = frozenset(settings.s3_buckets)
        self._limit_bytes = settings.image_limit_bytes
        self._deadline_s = settings.fetch_deadline_s
        self._requests = AdaptiveConcurrency(connections)
        self._threads = ThreadPoolExecutor(connections, thread_name_prefix="fetch")
        self._client = s3_client(
            settings.s3_endpoint,
            connect_timeout=min(_CONNECT_TIMEOUT_S, self._deadline_s),
            read_timeout=min(_READ_TIMEOUT_S, self._deadline_s),
            max_pool_connections=connections,
            retries={"total_max_attempts": 1, "mode": "standard"},  # the caller retries
        )
        watch_connections(self._client)

    @asynccontextmanager
    async def open(self, reference: ObjectReference) -> AsyncIterator[StoredObject]:
        """The object. Its memory stays reserved in `budget` until the context ends.

        Waits for a connection and for memory; these waits do not count towards the deadline.

        Raises:
            Forbidden: the bucket is not allowed, or the store denies access to the object.
            NotFound: no such bucket, key or version.
            ObjectChanged: the object has another ETag than the reference.
            TooLarge: the object has more than `image_limit_bytes`.
            StoreUnavailable: a temporary error, or wrong credentials.
        """
        self._check_reference(reference)
        async with AsyncExitStack() as resources:
            async with self._requests.request():
                stored = await self._fetch(reference, resources)
            yield stored

    async def is_current_version(self, reference: ObjectReference) -> bool:
        """Whether the version of the reference is the present one of its key. True if the store names no version.

        Raises as `open`.
        """
        self._check_reference(reference)

        def look() -> str | None:
            with map_s3_errors(reference.uri):
                found = self._client.head_object(Bucket=reference.bucket, Key=reference.key)
            version_id: str | None = found.get("VersionId")
            return version_id

        async with self._requests.request():
            return await self._run_in_thread(look, SocketDeadline(), self._deadline_s) in {None, reference.version_id}

    def close(self) -> None:
        """Release the connections. Running fetches fail. Does not wait."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def _check_reference(self, reference: ObjectReference) -> None:
        """Reject, without a request, a reference that must not or cannot be read."""
        if reference.bucket not in self._buckets:
            raise Forbidden(f"the bucket {reference.bucket!r} is not one of SLUICE_S3_BUCKETS")
        try:
            key = reference.key.encode()
        except UnicodeEncodeError:
            raise NotFound("the key is not valid Unicode, so no object has it") from None
        if not 0 < len(key) <= _KEY_LIMIT_BYTES:
            raise NotFound(f"the key has {len(key)} bytes; S3 allows 1 to {_KEY_LIMIT_BYTES}")
        if not {".", ".."}.isdisjoint(reference.key.split("/")):
            # A proxy in front of the store may resolve these segments, and so reach another bucket.
            raise Forbidden("the key has a segment . or .., which is not allowed")
        if reference.etag and not _ETAG_PATTERN.fullmatch(reference.etag):
            # No object can have this ETag, so the object differs from the submitted one.
            raise ObjectChanged("the submission's ETag is invalid, so no object has it")

    async def _fetch(self, reference: ObjectReference, resources: AsyncExitStack) -> StoredObject:
        socket_deadline = SocketDeadline()
        download = _Download(self._client, reference, self._limit_bytes, socket_deadline)
        started = time.monotonic()
        size = await self._run_in_thread(download.begin, socket_deadline, self._deadline_s)
        left_s = self._deadline_s - (time.monotonic() - started)
        try:
            await resources.enter_async_context(self.budget.reserve(size))
        except BaseException:
            download.close()
            raise
        return await self._run_in_thread(download.finish, socket_deadline, max(left_s, 0.0))

    async def _run_in_thread(self, step: Callable[[], T], socket_deadline: SocketDeadline, seconds: float) -> T:
        loop = asyncio.get_running_loop()
        timer = loop.call_later(seconds, socket_deadline.expire)
        try:
            async with asyncio.timeout(seconds + _GRACE_S):
                return await loop.run_in_executor(self._threads, socket_deadline.run, step)
        except TimeoutError:
            raise StoreUnavailable(_timeout_message(self._deadline_s)) from None
        except StoreUnavailable:
            if socket_deadline.expired:
                raise StoreUnavailable(_timeout_message(self._deadline_s)) from None
            raise
        except asyncio.CancelledError:
            socket_deadline.expire()  # other requests need the thread
            raise
        finally:
            timer.cancel()


class _Download:
    """One GetObject in two steps, each in a thread: first the size, then the bytes."""

    def __init__(
        self, client: Any, reference: ObjectReference, limit_bytes: int, socket_deadline: SocketDeadline
    ) -> None:
        self._client = client
        self._reference = reference
        self._name = f"{reference.uri} in version {reference.version_id}" if reference.version_id else reference.uri
        self._limit_bytes = limit_bytes
        self._socket_deadline = socket_deadline
        self._response: dict[str, Any] = {}
        self._size: int | None = None

    def begin(self) -> int:
        """Send the request and return the largest possible size of the object. Leaves the body open."""
        reference = self._reference
        pins = {}
        if reference.version_id:
            pins["VersionId"] = reference.version_id
        if reference.etag:
            pins["IfMatch"] = f'"{reference.etag}"'
        with map_s3_errors(self._name):
            self._response = self._client.get_object(Bucket=reference.bucket, Key=reference.key, **pins)
        try:
            return self._check_size()
        except BaseException:
            self.close()
            raise

    def finish(self) -> StoredObject:
        """Read the body, with at most the limit and one chunk in memory."""
        content = io.BytesIO()  # `getvalue` returns the buffer without a copy
        try:
            with map_s3_errors(self._name):
                while chunk := self._response["Body"].read(_CHUNK_BYTES):
                    content.write(chunk)
                    if content.tell() > self._limit_bytes:
                        raise self._too_large(content.tell())
        finally:
            self.close()
        if self._socket_deadline.expired or (self._size is not None and content.tell() != self._size):
            raise StoreUnavailable("the object store closed the connection before the last byte")
        return StoredObject(content.getvalue(), self._response.get("VersionId"), self._etag())

    def close(self) -> None:
        """Close the body. If it was not read to its end, this closes the connection, too."""
        if self._response:
            self._response["Body"].close()

    def _check_size(self) -> int:
        if self._socket_deadline.expired:
            raise StoreUnavailable("the object store answered after the deadline")
        reference = self._reference
        if reference.etag and self._etag() != reference.etag:
            raise ObjectChanged(f"{reference.uri} has the ETag {self._etag()}, not {reference.etag}")
        version_id = self._response.get("VersionId")
        if reference.version_id and version_id and version_id != reference.version_id:
            raise ObjectChanged(f"the store returned another version of {reference.uri}")
        size = self._response.get("ContentLength")
        if not isinstance(size, int) or size < 0:
            return self._limit_bytes  # the server sends no size: count while reading
        if size > self._limit_bytes:
            raise self._too_large(size)
        self._size = size
        return size

    def _etag(self) -> str | None:
        etag = self._response.get("ETag")
        return etag.strip('"') if isinstance(etag, str) else None

    def _too_large(self, size: int) -> TooLarge:
        return TooLarge(f"the object has at least {size} bytes; the limit is {self._limit_bytes} bytes")


def _timeout_message(deadline_s: float) -> str:
    return f"the object store did not deliver within {deadline_s:g} s"

"""Reads from S3: against a real S3 server, and against servers that lie, drip and hang."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import boto3
import pytest

from services.core.errors import Forbidden, NotFound, ObjectChanged, SluiceError, StoreUnavailable, TooLarge
from services.core.messages import ObjectReference
from services.core.values import StoredObject
from services.images.object_store import ObjectStore
from tests.support.images import can_reserve, make_settings, wait_for_a_waiter
from tests.support.s3_server import CREDENTIALS

BUCKET = "images"


def make_store(endpoint: str, **overrides: Any) -> ObjectStore:
    return ObjectStore(make_settings(s3_endpoint=endpoint, s3_buckets=(BUCKET, "missing", "Bad Name"), **overrides))


def reference(key: str, **pins: Any) -> ObjectReference:
    return ObjectReference(bucket=pins.pop("bucket", BUCKET), key=key, **pins)


async def read(store: ObjectStore, reference: ObjectReference) -> StoredObject:
    async with store.open(reference) as stored:
        return stored


@pytest.fixture(scope="module")
def s3(s3_endpoint: str) -> Any:
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    client.create_bucket(Bucket=BUCKET)
    client.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})
    client.create_bucket(Bucket="private")
    client.put_object(Bucket="private", Key="x", Body=b"secret")
    return client


@pytest.fixture
def store(s3_endpoint: str, s3: Any) -> Iterator[ObjectStore]:
    store = make_store(s3_endpoint, image_limit_bytes=1_000_000)
    yield store
    store.close()


# Responses of a real server


async def test_read_returns_version_and_etag(store: ObjectStore, s3: Any) -> None:
    put = s3.put_object(Bucket=BUCKET, Key="a/b c+ü%20?#.jpg", Body=b"x" * 999_999)
    stored = await read(store, reference("a/b c+ü%20?#.jpg"))
    assert stored.data == b"x" * 999_999
    assert stored.version_id == put["VersionId"]
    assert stored.etag == put["ETag"].strip('"')


async def test_pinned_version_is_read(store: ObjectStore, s3: Any) -> None:
    first = s3.put_object(Bucket=BUCKET, Key="versions", Body=b"first")
    second = s3.put_object(Bucket=BUCKET, Key="versions", Body=b"second")
    assert (await read(store, reference("versions", version_id=first["VersionId"]))).data == b"first"
    assert (await read(store, reference("versions", version_id=second["VersionId"]))).data == b"second"
    assert (await read(store, reference("versions", version_id=""))).data == b"second"


async def test_object_with_another_etag_is_rejected(store: ObjectStore, s3: Any) -> None:
    first = s3.put_object(Bucket=BUCKET, Key="changed", Body=b"first")
    assert (await read(store, reference("changed", etag=first["ETag"]))).data == b"first"
    s3.put_object(Bucket=BUCKET, Key="changed", Body=b"second")
    with pytest.raises(ObjectChanged):
        await read(store, reference("changed", etag=first["ETag"]))


@pytest.mark.parametrize("etag", ["*", 'a"b', "a\r\nHost: evil", "ü", "x" * 5000])
async def test_invalid_etag_is_rejected(store: ObjectStore, s3: Any, etag: str) -> None:
    s3.put_object(Bucket=BUCKET, Key="etags", Body=b"x")
    with pytest.raises((ObjectChanged, Forbidden)):
        await read(store, reference("etags", etag=etag))


async def test_missing_object_is_not_found(store: ObjectStore, s3: Any) -> None:
    put = s3.put_object(Bucket=BUCKET, Key="deleted", Body=b"x")
    marker = s3.delete_object(Bucket=BUCKET, Key="deleted")
    for absent in (
        reference("nowhere"),
        reference("x", bucket="missing"),
        reference("x", bucket="Bad Name"),
        reference("deleted"),
        reference("deleted", version_id=marker["VersionId"]),
        reference("deleted", version_id="no such version"),
        reference("k" * 2000),
        reference("lone \ud800 surrogate"),
        reference(""),
    ):
        with pytest.raises(NotFound):
            await read(store, absent)
    assert (await read(store, reference("deleted", version_id=put["VersionId"]))).data == b"x"


async def test_other_bucket_is_rejected_without_a_request() -> None:
    store = make_store("http://127.0.0.1:1")
    for forbidden in (
        reference("x", bucket="private"),
        reference("../private/x"),
        reference("a/./b"),
        reference("a/.."),
    ):
        with pytest.raises(Forbidden):
            await read(store, forbidden)
    store.close()


async def test_object_over_the_limit_is_rejected_before_its_body(store: ObjectStore, s3: Any) -> None:
    s3.put_object(Bucket=BUCKET, Key="large", Body=b"x" * 1_000_001)
    with pytest.raises(TooLarge):
        await read(store, reference("large"))
    s3.put_object(Bucket=BUCKET, Key="exactly", Body=b"x" * 1_000_000)
    assert len((await read(store, reference("exactly"))).data) == 1_000_000


async def test_memory_is_reserved_until_the_context_ends(s3_endpoint: str, s3: Any) -> None:
    store = make_store(s3_endpoint, image_memory_bytes=100_000)
    s3.put_object(Bucket=BUCKET, Key="part", Body=b"x" * 60_000)
    async with store.open(reference("part")) as stored:
        assert len(stored.data) == 60_000
        assert await can_reserve(store.budget, 40_000)
        assert not await can_reserve(store.budget, 40_001)
        second = asyncio.create_task(read(store, reference("part")))
        await wait_for_a_waiter(store.budget)
        assert not second.done()
    assert len((await asyncio.wait_for(second, 30)).data) == 60_000
    assert await can_reserve(store.budget, store.budget.limit_bytes)
    with pytest.raises(NotFound):
        await read(store, reference("nowhere"))
    assert await can_reserve(store.budget, store.budget.limit_bytes)
    store.close()


async def test_cancelled_wait_for_memory_leaves_nothing_reserved(s3_endpoint: str, s3: Any) -> None:
    store = make_store(s3_endpoint, image_memory_bytes=100_000, in_flight=1)
    s3.put_object(Bucket=BUCKET, Key="part", Body=b"x" * 60_000)
    async with store.open(reference("part")):
        second = asyncio.create_task(read(store, reference("part")))
        await wait_for_a_waiter(store.budget)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
    assert len((await asyncio.wait_for(read(store, reference("part")), 30)).data) == 60_000
    assert await can_reserve(store.budget, store.budget.limit_bytes)
    store.close()


async def test_concurrent_reads_return_their_objects(store: ObjectStore, s3: Any) -> None:
    for n in range(8):
        s3.put_object(Bucket=BUCKET, Key=f"many/{n}", Body=bytes([n]) * 100_000)
    stored = await asyncio.gather(*(read(store, reference(f"many/{n % 8}")) for n in range(80)))
    assert all(one.data == bytes([n % 8]) * 100_000 for n, one in enumerate(stored))


# Responses of a faulty server


@contextmanager
def http_server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that reads each request and calls `answer` with the connection."""
    listener = socket.create_server(("127.0.0.1", 0))
    stopping = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection:
            try:
                request = b""
                while b"\r\n\r\n" not in request:
                    received = connection.recv(65_536)
                    if not received:
                        return
                    request += received
                answer(connection)
            except OSError:
                pass

    def accept() -> None:
        while not stopping.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stopping.set()
        listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`, which closing does not
        listener.close()


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


def head(*lines: str) -> bytes:
    return "\r\n".join(("HTTP/1.1 200 OK", 'ETag: "e"', *lines, "", "")).encode()


def drip(connection: socket.socket, byte: bytes) -> None:
    while True:
        connection.sendall(byte)
        time.sleep(0.05)


def hang(connection: socket.socket) -> None:
    connection.recv(1)


def drips_headers(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Padding: ")
    drip(connection, b"x")


def drips_body(connection: socket.socket) -> None:
    connection.sendall(head("Content-Length: 500000"))
    drip(connection, b"x")


def drips_chunk_sizes(connection: socket.socket) -> None:
    connection.sendall(head("Transfer-Encoding: chunked"))
    drip(connection, b"0")


def drips_and_will_close(connection: socket.socket) -> None:
    connection.sendall(head("Content-Length: 500000", "Connection: close"))
    drip(connection, b"x")


def hangs_at_once(connection: socket.socket) -> None:
    hang(connection)


def hangs_in_the_body(connection: socket.socket) -> None:
    connection.sendall(head("Content-Length: 500000") + b"x" * 1000)
    hang(connection)


@pytest.mark.parametrize(
    "behaviour",
    [drips_headers, drips_body, drips_chunk_sizes, drips_and_will_close, hangs_at_once, hangs_in_the_body],
)
async def test_slow_server_holds_no_thread_after_the_deadline(behaviour: Callable[[socket.socket], None]) -> None:
    with http_server(behaviour) as endpoint:
        store = make_store(endpoint, fetch_deadline_s=0.7, in_flight=2)
        started = time.monotonic()
        results = await asyncio.gather(*(read(store, reference("x")) for _ in range(4)), return_exceptions=True)
        assert all(isinstance(result, StoreUnavailable) for result in results), results
        assert time.monotonic() - started > 1.3  # two at a time
        # The servers would hold the threads for ever.
        free = (asyncio.get_running_loop().run_in_executor(store._threads, int) for _ in range(4))
        await asyncio.wait_for(asyncio.gather(*free), 60)
        assert await can_reserve(store.budget, store.budget.limit_bytes)
        store.close()


async def test_cancelled_read_frees_its_thread() -> None:
    requested = threading.Event()

    def hang_after_the_request(connection: socket.socket) -> None:
        requested.set()
        hangs_in_the_body(connection)

    with http_server(hang_after_the_request) as endpoint:
        store = make_store(endpoint, fetch_deadline_s=60, in_flight=1)
        reading = asyncio.create_task(read(store, reference("x")))
        assert await asyncio.to_thread(requested.wait, 30)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await asyncio.wait_for(asyncio.get_running_loop().run_in_executor(store._threads, int), 15)
        assert await can_reserve(store.budget, store.budget.limit_bytes)
        store.close()


def without_length(connection: socket.socket) -> None:
    connection.sendall(head("Connection: close") + b"x" * 5_000_000)


def chunked_without_end(connection: socket.socket) -> None:
    connection.sendall(head("Transfer-Encoding: chunked"))
    while True:
        connection.sendall(b"10000\r\n" + b"x" * 65_536 + b"\r\n")


@pytest.mark.parametrize("behaviour", [without_length, chunked_without_end])
async def test_body_over_the_limit_is_rejected_while_reading(behaviour: Callable[[socket.socket], None]) -> None:
    with http_server(behaviour) as endpoint:
        store = make_store(endpoint, image_limit_bytes=1_000_000)
        with pytest.raises(TooLarge):
            await read(store, reference("x"))
        store.close()


async def test_body_without_a_length_is_read_to_the_end() -> None:
    def answer(connection: socket.socket) -> None:
        connection.sendall(head("Transfer-Encoding: chunked") + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")

    with http_server(answer) as endpoint:
        store = make_store(endpoint)
        assert (await read(store, reference("x"))).data == b"abcde"
        store.close()


def promises_more(connection: socket.socket) -> None:
    connection.sendall(head("Content-Length: 1000") + b"x" * 999)


def hangs_up(connection: socket.socket) -> None:
    del connection


def speaks_something_else(connection: socket.socket) -> None:
    connection.sendall(b"SSH-2.0-OpenSSH_9.9\r\n")


def has_a_length_that_is_no_number(connection: socket.socket) -> None:
    connection.sendall(head("Content-Length: many") + b"x")


def compresses_a_bomb(connection: socket.socket) -> None:
    connection.sendall(head("Content-Encoding: gzip", "Content-Length: 4") + b"\x1f\x8b\x08\x00")


@pytest.mark.parametrize("behaviour", [promises_more, hangs_up, speaks_something_else, has_a_length_that_is_no_number])
async def test_invalid_response_is_unavailable(behaviour: Callable[[socket.socket], None]) -> None:
    with http_server(behaviour) as endpoint:
        store = make_store(endpoint, fetch_deadline_s=3)
        with pytest.raises(StoreUnavailable):
            await read(store, reference("x"))
        assert await can_reserve(store.budget, store.budget.limit_bytes)
        store.close()


async def test_compressed_body_is_not_decompressed() -> None:
    with http_server(compresses_a_bomb) as endpoint:
        store = make_store(endpoint)
        assert (await read(store, reference("x"))).data == b"\x1f\x8b\x08\x00"
        store.close()


async def test_response_with_another_etag_is_rejected() -> None:
    def answer(connection: socket.socket) -> None:
        connection.sendall(head("Content-Length: 1") + b"x")

    with http_server(answer) as endpoint:
        store = make_store(endpoint)
        with pytest.raises(ObjectChanged):
            await read(store, reference("x", etag="other"))
        store.close()


async def test_unreachable_server_is_unavailable() -> None:
    store = make_store("http://127.0.0.1:1")
    with pytest.raises(StoreUnavailable):
        await read(store, reference("x"))
    store.close()


async def test_missing_credentials_are_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    store = make_store("http://127.0.0.1:1")
    with pytest.raises(StoreUnavailable, match="redentials"):
        await read(store, reference("x"))
    store.close()


ANSWERS: list[tuple[int, str, str, type[SluiceError]]] = [
    (403, "AccessDenied", "Access Denied", Forbidden),
    (403, "AllAccessDisabled", "", Forbidden),
    (403, "InvalidObjectState", "The operation is not valid for the object's storage class", Forbidden),
    (400, "InvalidRequest", "The object was stored using a form of Server Side Encryption.", Forbidden),
    (403, "InvalidAccessKeyId", "", StoreUnavailable),
    (403, "SignatureDoesNotMatch", "", StoreUnavailable),
    (403, "RequestTimeTooSkewed", "", StoreUnavailable),
    (400, "ExpiredToken", "The provided token has expired.", StoreUnavailable),
    (400, "InvalidToken", "", StoreUnavailable),
    (400, "AuthorizationHeaderMalformed", "", StoreUnavailable),
    (400, "RequestTimeout", "", StoreUnavailable),
    (404, "NoSuchKey", "", NotFound),
    (404, "NoSuchBucket", "", NotFound),
    (404, "NoSuchVersion", "", NotFound),
    (405, "MethodNotAllowed", "", NotFound),
    (400, "InvalidArgument", "Invalid version id specified", NotFound),
    (412, "PreconditionFailed", "", ObjectChanged),
    (503, "SlowDown", "Please reduce your request rate.", StoreUnavailable),
    (500, "InternalError", "", StoreUnavailable),
    (502, "", "", StoreUnavailable),
    (429, "", "", StoreUnavailable),
]


@pytest.mark.parametrize(("status", "code", "text", "error"), ANSWERS)
async def test_error_response_is_mapped(status: int, code: str, text: str, error: type[SluiceError]) -> None:
    body = f"<Error><Code>{code}</Code><Message>{text}</Message></Error>".encode() if code else b""

    def answer(connection: socket.socket) -> None:
        lines = (f"HTTP/1.1 {status} Error", "Content-Type: application/xml", f"Content-Length: {len(body)}", "", "")
        connection.sendall("\r\n".join(lines).encode() + body)

    with http_server(answer) as endpoint:
        store = make_store(endpoint)
        with pytest.raises(error) as caught:
            await read(store, reference("x", etag="e"))
        assert str(caught.value)
        store.close()

"""Hostile clients on real connections are refused, and other clients are still served."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress

import httpx
import psutil
import pytest

from services.gateway.flood_gate import BURST, REFUSED_PER_S
from services.gateway.server import HEAD_LIMIT_BYTES, GatewayServer, listen
from tests.support.gateway_bench import JPEG, Gate, GatewayBench, data_url

SLOW = 500
PATH = "/v1/assessments"
HEAD = "POST /v1/assessments?wait=5 HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/json\r\n"


@asynccontextmanager
async def connections(server: GatewayServer, count: int, head: str) -> AsyncIterator[list[asyncio.StreamReader]]:
    """Open connections that each send `head` and then nothing."""
    opened = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(count)]
    try:
        for _, writer in opened:
            writer.write(head.encode())
        yield [reader for reader, _ in opened]
    finally:
        for _, writer in opened:
            writer.close()


async def statuses(readers: list[asyncio.StreamReader]) -> list[bytes]:
    """Return the status of each response; empty if the connection was closed without one."""
    async with asyncio.timeout(30):
        answers = await asyncio.gather(*(reader.read() for reader in readers), return_exceptions=True)
    return [answer[9:12] if isinstance(answer, bytes) else b"" for answer in answers]


async def serve(idle: GatewayBench) -> GatewayServer:
    """Start a gateway that knows the API keys of the clients."""
    for role, tenant in (("moderate", "default"), ("admin", "default"), ("moderate", "neighbour")):
        idle.token(role, tenant)  # type: ignore[arg-type]
    return await idle.serve()


async def wait_until_all_closed(server: GatewayServer, within_s: float) -> None:
    async with asyncio.timeout(within_s):
        while server._server.server_state.connections:  # noqa: ASYNC110 - uvicorn has no event for this
            await asyncio.sleep(0.05)


async def check_neighbour_is_served(idle: GatewayBench, server: GatewayServer) -> None:
    """Send a request with another API key on another connection."""
    headers = {"Authorization": f"Bearer {idle.token(tenant='neighbour')}"}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", headers=headers, timeout=20) as client:
        answer = await client.post(f"{PATH}?wait=15", files={"file": ("a.jpg", JPEG)})
        assert answer.status_code == 200, answer.text


async def test_slow_uploads_of_one_key_are_refused_within_its_limits(idle: GatewayBench) -> None:
    """Each upload announces a megabyte and sends little of it."""
    idle.configure(gateway_rate_per_s=10_000)
    server = await serve(idle)
    before = psutil.Process().memory_info().rss
    head = f"{HEAD}Authorization: Bearer {idle.token()}\r\nContent-Length: 1000000\r\n\r\n" + " " * 1000
    async with connections(server, SLOW, head) as readers:
        await check_neighbour_is_served(idle, server)
        answers = await statuses(readers)
        assert psutil.Process().memory_info().rss - before < 200 << 20
    assert {b"408", b"429"} <= set(answers) <= {b"408", b"429", b""}, (
        "refused, or closed because there are too many connections"
    )
    assert answers.count(b"408") <= idle.settings.gateway_concurrency
    await check_neighbour_is_served(idle, server)


async def test_slow_uploads_without_a_key_are_refused(idle: GatewayBench) -> None:
    server = await serve(idle)
    head = f"{HEAD}Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
    async with connections(server, SLOW, head) as readers:
        await check_neighbour_is_served(idle, server)
        assert {b"401"} <= set(await statuses(readers)) <= {b"401", b""}


async def test_connections_without_a_request_are_closed(idle: GatewayBench) -> None:
    """More connections than allowed: the oldest are closed first, the others at the deadline for a request's head."""
    idle.configure(gateway_connections=100)
    server = await serve(idle)
    async with connections(server, SLOW, "GET /healthz HTTP/1.1\r\nX-Slow: ") as readers:
        await check_neighbour_is_served(idle, server)
        assert set(await statuses(readers)) == {b""}
    await check_neighbour_is_served(idle, server)


async def test_slow_uploads_over_the_limit_of_connections_are_closed(idle: GatewayBench) -> None:
    """The limits of the key are high, so only the number of connections is limited: the slowest are closed."""
    idle.configure(gateway_rate_per_s=10_000, gateway_concurrency=1000, gateway_connections=100)
    server = await serve(idle)
    head = f"{HEAD}Authorization: Bearer {idle.token()}\r\nContent-Length: 1000000\r\n\r\n{{"
    async with connections(server, SLOW, head) as readers:
        await check_neighbour_is_served(idle, server)
        answers = await statuses(readers)
    assert set(answers) == {b"408", b""}
    assert answers.count(b"408") <= idle.settings.gateway_connections


async def test_malformed_and_broken_off_requests_are_refused(idle: GatewayBench) -> None:
    server = await serve(idle)
    bearer = f"Authorization: Bearer {idle.token()}\r\n"
    for sent, is_half_closed in (
        (f"{HEAD}{bearer}Content-Length: 100\r\n\r\n{{", True),
        (f"{HEAD}{bearer}Content-Length: 100\r\n\r\n{{", False),
        (f"{HEAD}{bearer}Transfer-Encoding: chunked\r\n\r\nzz\r\n", True),
        (f"{HEAD}{bearer}Content-Length: 2\r\n\r\n{{}}", True),
        ("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", True),
        ("GET / HTTP/1.1\r\n" + "X: y\r\n" * 10_000, True),
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(sent.encode("latin-1"))
        if is_half_closed:
            writer.write_eof()
        else:
            writer.transport.abort()
            continue
        async with asyncio.timeout(10):
            try:
                answer = await reader.read()
            except ConnectionResetError:
                answer = b""
        assert answer[9:10] in {b"4", b""}, answer
        writer.close()
    await check_neighbour_is_served(idle, server)


def in_chunks(body: bytes, size: int) -> bytes:
    """The body in the transfer coding chunked, without its end."""
    parts = (body[start : start + size] for start in range(0, len(body), size))
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)


async def test_body_in_tiny_chunks_is_refused(idle: GatewayBench) -> None:
    """Chunks beyond the first 1000 need 64 bytes each. The end is never sent, so only the limit can refuse it."""
    server = await serve(idle)
    head = f"{HEAD}Authorization: Bearer {idle.token()}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    extension = b"1;" + b"x" * 4000 + b"\r\na\r\n"
    for body in (in_chunks(b" " * 100_000, 1), in_chunks(b" " * 200_000, 40), extension * 1100):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(head + body)
        async with asyncio.timeout(30):
            with suppress(ConnectionResetError):  # the gateway closes it while the client still sends
                assert (await reader.read())[9:12] in {b"400", b""}
        writer.close()
    await check_neighbour_is_served(idle, server)


async def test_bodies_in_few_or_larger_chunks_are_read(idle: GatewayBench) -> None:
    server = await serve(idle)
    head = HEAD.replace(PATH, "/v1/moderations") + f"Authorization: Bearer {idle.token()}\r\n"
    url = {"type": "image_url", "image_url": {"url": data_url()}}
    body = json.dumps({"input": url}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    for chunked in (in_chunks(body[:900], 1) + in_chunks(body[900:], 400), in_chunks(body + b" " * 300_000, 64)) * 2:
        writer.write(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunked + b"0\r\n\r\n")
        async with asyncio.timeout(30):
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer[9:12] == b"200", answer
            length = next(line for line in answer.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.partition(b":")[2]))
    writer.close()


async def test_tiny_chunks_behind_the_response_close_the_connection(
    idle: GatewayBench, caplog: pytest.LogCaptureFixture
) -> None:
    """The request is refused for its API key before its body, which the client then sends in tiny chunks."""
    server = await serve(idle)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode())
    async with asyncio.timeout(30):
        assert (await reader.readuntil(b"\r\n"))[9:12] == b"401"
        writer.write(in_chunks(b"x" * 100_000, 1))
        with suppress(ConnectionResetError):
            await reader.read()
    await wait_until_all_closed(server, 30)
    writer.close()
    assert "Fatal error" not in caplog.text
    await check_neighbour_is_served(idle, server)


async def test_closed_connection_cancels_judging_and_frees_its_slot(idle: GatewayBench) -> None:
    idle.configure(gateway_in_flight=1, gateway_deadline_s=60)
    server = await serve(idle)
    gate = idle.guard.script = Gate()
    headers = {"Authorization": f"Bearer {idle.token()}"}
    request = {"input": {"type": "image_url", "image_url": {"url": idle.put("hostile/a.jpg")}}}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", headers=headers) as client:
        abandoned = asyncio.create_task(client.post("/v1/moderations", json=request))
        await gate.wait_for_calls(1)
        abandoned.cancel()  # closes the connection
        async with asyncio.timeout(10):
            await gate.cancelled.wait()
        gate.opened.set()
        assert (await client.post("/v1/moderations", json=request)).status_code == 200


async def test_client_of_a_refused_large_upload_gets_the_response(idle: GatewayBench) -> None:
    """The client still sends when the response comes. A reset connection would hide the response."""
    server = await serve(idle)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=20) as client:
        for size in (200_000, 900_000, 1_500_000):
            answer = await client.post(PATH, content=b"x" * size, headers={"content-type": "application/json"})
            assert answer.status_code == 401
            with_key = {"content-type": "application/json", "authorization": f"Bearer {idle.token()}"}
            answer = await client.post(PATH, content=b"x" * size, headers=with_key)
            assert answer.status_code == (413 if size > idle.settings.gateway_body_limit_bytes else 400)


async def test_stopped_replica_accepts_no_connections_on_the_shared_port(idle: GatewayBench) -> None:
    server = await serve(idle)
    port = server.port
    with listen("127.0.0.1", port) as other:
        assert other.getsockname()[1] == port
    await server.stop()
    assert not server.is_serving
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


async def test_pipelining_clients_that_read_nothing_are_closed(idle: GatewayBench) -> None:
    """Each sends 200 requests without an API key and takes no response. They must not keep others out."""
    idle.configure(gateway_connections=50)
    server = await serve(idle)
    head = "GET /openapi.json HTTP/1.1\r\nHost: gateway\r\n\r\n" * 200
    async with connections(server, 50, head) as readers:
        for reader in readers:
            reader._transport.pause_reading()  # type: ignore[attr-defined]
        await check_neighbour_is_served(idle, server)
        await asyncio.sleep(0.2)
        for reader in readers:
            reader._transport.resume_reading()  # type: ignore[attr-defined]
        async with asyncio.timeout(10):
            answers = await asyncio.gather(*(reader.read() for reader in readers), return_exceptions=True)
    assert all(isinstance(answer, Exception) or answer.count(b"HTTP/1.1 ") <= 1 for answer in answers)


async def test_stalled_readers_with_a_key_are_evicted_and_closed(idle: GatewayBench) -> None:
    """With an API key, a client may pipeline. If it takes no response, it makes room for others, then it is closed."""
    idle.configure(gateway_connections=3, gateway_rate_per_s=100_000)
    server = await serve(idle)
    server._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)  # connections inherit it
    head = f"GET {PATH}/none HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer {idle.token()}\r\n\r\n"
    loop = asyncio.get_running_loop()
    with ExitStack() as closing:
        for _ in range(3):
            stalled = closing.enter_context(socket.socket())
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stalled.setblocking(False)
            await loop.sock_connect(stalled, ("127.0.0.1", server.port))
            with suppress(TimeoutError):
                async with asyncio.timeout(0.1):  # the gateway does not take all of it
                    await loop.sock_sendall(stalled, head.encode() * 1000)
        async with asyncio.timeout(60):
            while not any(each.flow.write_paused for each in server._server.server_state.connections):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await check_neighbour_is_served(idle, server)
        await wait_until_all_closed(server, 20)


async def test_closing_connection_whose_client_takes_nothing_is_closed_at_the_deadline(idle: GatewayBench) -> None:
    """`Connection: close` alone would wait until the client takes the response, for ever."""
    server = await serve(idle)
    stalled = socket.socket()
    stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    stalled.setblocking(False)
    with stalled:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(stalled, ("127.0.0.1", server.port))
        await asyncio.sleep(0.1)
        (held,) = server._server.server_state.connections
        held.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
        await loop.sock_sendall(stalled, b"GET /openapi.json HTTP/1.1\r\nHost: g\r\nConnection: close\r\n\r\n")
        await asyncio.sleep(0.3)
        assert held.transport.get_write_buffer_size() > 0
        await wait_until_all_closed(server, 5)


async def test_flood_of_unknown_keys_leaves_connections_for_others(idle: GatewayBench) -> None:
    """More clients with made-up keys than connections. Most are refused at once instead of waiting for a look-up."""
    idle.configure(gateway_connections=64, gateway_keys_refresh_s=5)
    server = await serve(idle)
    refused: list[int] = []
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=20) as client:

        async def guess(number: int) -> None:
            headers = {"Authorization": f"Bearer sk-sluice-{number:016x}-{'A' * 43}"}
            while True:
                try:
                    refused.append((await client.get(f"{PATH}/{'0' * 32}", headers=headers)).status_code)
                    await asyncio.sleep(0.5)
                except httpx.TransportError:
                    await asyncio.sleep(0.05)

        guessing = [asyncio.create_task(guess(number)) for number in range(80)]
        try:
            while not {401, 503} <= set(refused):  # noqa: ASYNC110 - the clients have no event for this
                await asyncio.sleep(0.05)
            for _ in range(5):
                await check_neighbour_is_served(idle, server)
        finally:
            for task in guessing:
                task.cancel()
            await asyncio.gather(*guessing, return_exceptions=True)
    assert set(refused) == {401, 503}


@asynccontextmanager
async def flood(server: GatewayServer, key: str, connections: int, statuses: list[bytes]) -> AsyncIterator[None]:
    """Send requests without a pause on some connections, and collect the statuses of the responses."""
    head = f"GET {PATH}/none HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer {key}\r\n\r\n".encode()

    async def send() -> None:
        while True:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            with suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    writer.write(head)
                    answer = await reader.readuntil(b"\r\n\r\n")
                    statuses.append(answer[9:12])
                    await reader.readexactly(int(answer.lower().split(b"content-length: ")[1].split()[0]))
            writer.close()

    sending = [asyncio.create_task(send()) for _ in range(connections)]
    try:
        yield
    finally:
        for task in sending:
            task.cancel()
        await asyncio.gather(*sending, return_exceptions=True)


@pytest.mark.parametrize("is_valid", [False, True], ids=["unknown-key", "key-over-its-rate"])
async def test_flood_without_pauses_is_read_at_a_limited_rate(idle: GatewayBench, is_valid: bool) -> None:
    idle.configure(gateway_rate_per_s=1, gateway_connections=64)  # so 8 unknown keys are looked up at a time
    server = await serve(idle)
    key = idle.token() if is_valid else f"sk-sluice-{'0' * 16}-{'A' * 43}"
    protocol = server._server.config.http_protocol_class
    statuses: list[bytes] = []
    connections = 40
    began = asyncio.get_running_loop().time()
    async with flood(server, key, connections, statuses), asyncio.timeout(60):
        while len(statuses) < 250 or not protocol.held:  # type: ignore[union-attr]  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await check_neighbour_is_served(idle, server)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as client:
            assert (await client.get("/healthz")).status_code == 200
        took_s = asyncio.get_running_loop().time() - began
        assert len(statuses) <= BURST + REFUSED_PER_S * took_s + connections
    if is_valid:
        assert set(statuses) == {b"404", b"429"}
    else:
        assert set(statuses) <= {b"401", b"503"}
    await check_neighbour_is_served(idle, server)


async def test_json_of_many_values_is_refused_before_it_is_decoded(idle: GatewayBench) -> None:
    """Decoded, each body would take 27 times its size and block the event loop for seconds."""
    limit = 32 << 20
    idle.configure(gateway_body_limit_bytes=limit, gateway_body_memory_bytes=8 * limit, gateway_body_deadline_s=20)
    server = await serve(idle)
    before = psutil.Process().memory_info().rss
    headers = {"Authorization": f"Bearer {idle.token()}", "Content-Type": "application/json"}
    bodies = [
        b'{"input": [' + b"[]," * 5_000_000 + b"[]]}",
        b'{"input": "data:", "x": [' + b"[]," * 5_000_000 + b"[]]}",
        b'{"input": "' + b"x" * 8_000_000 + b'"}',
        b'{"input": [' + b"{}," * 300_000 + b"{}]}",
    ]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", headers=headers, timeout=30) as client:
        for body in bodies:
            answer = await client.post("/v1/moderations", content=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        many = {"input": [{"type": "image_url", "image_url": {"url": "s3://uploads/a"}}] * 17}
        refused = await client.post("/v1/moderations", json=many)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input")
    assert psutil.Process().memory_info().rss - before < 150 << 20
    await check_neighbour_is_served(idle, server)


async def test_large_json_with_an_image_is_still_read(bench: GatewayBench) -> None:
    padded = data_url(JPEG + b"\0" * 700_000)
    async with bench.client() as client:
        request = {"input": {"type": "image_url", "image_url": {"url": padded}}}
        assert (await client.post("/v1/moderations", json=request)).status_code == 200


@pytest.mark.parametrize("in_pieces", [False, True])
@pytest.mark.parametrize("many_fields", [False, True])
async def test_head_over_the_limit_is_refused_however_it_arrives(
    idle: GatewayBench, in_pieces: bool, many_fields: bool
) -> None:
    """A complete head in one packet never was an incomplete one, which is all that h11 limits."""
    server = await serve(idle)

    async def answer_to(filler_bytes: int) -> bytes:
        filler = "X: y\r\n" * (filler_bytes // 6) if many_fields else f"X-Filler: {'x' * filler_bytes}\r\n"
        head = f"GET /healthz HTTP/1.1\r\nHost: g\r\nConnection: close\r\n{filler}\r\n".encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        step = 5000 if in_pieces else len(head)
        with suppress(ConnectionError):
            for start in range(0, len(head), step):
                writer.write(head[start : start + step])
                await writer.drain()
                await asyncio.sleep(0.01)
        (status,) = await statuses([reader])
        writer.close()
        return status

    assert await answer_to(HEAD_LIMIT_BYTES - 200) == b"200"
    for filler_bytes in (HEAD_LIMIT_BYTES, 40_000, 120_000):
        assert await answer_to(filler_bytes) in {b"400", b""}, filler_bytes  # empty: reset while it still sent
    await check_neighbour_is_served(idle, server)


async def test_large_head_behind_another_request_is_refused(idle: GatewayBench) -> None:
    server = await serve(idle)
    token = idle.token()
    first = f"GET {PATH}/none HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer {token}\r\n\r\n"
    second = f"GET {PATH}/none HTTP/1.1\r\nHost: g\r\nX: {'x' * 40_000}\r\nAuthorization: Bearer {token}\r\n\r\n"
    async with connections(server, 1, first + second) as readers:
        async with asyncio.timeout(30):
            received = await readers[0].read()
    assert received.count(b"HTTP/1.1 404") == 1
    assert received.count(b"HTTP/1.1 400") == 1

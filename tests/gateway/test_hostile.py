"""Hostile clients on real connections are refused, and other clients are still served."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import psutil

from services.gateway.server import GatewayServer, listen
from tests.support.gateway_bench import JPEG, Gate, GatewayBench

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


async def check_neighbour_is_served(idle: GatewayBench, server: GatewayServer) -> None:
    """Send a request with another API key on another connection."""
    headers = {"Authorization": f"Bearer {idle.token(tenant='neighbour')}"}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", headers=headers, timeout=20) as client:
        answer = await client.post(f"{PATH}?wait=15", files={"file": ("a.jpg", JPEG)})
        assert answer.status_code == 200, answer.text


async def test_slow_uploads_of_one_key_are_refused_within_its_limits(idle: GatewayBench) -> None:
    """Each upload announces a megabyte and sends little of it."""
    idle.configure(gateway_rate_per_s=10_000)
    server = await idle.serve()
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
    server = await idle.serve()
    head = f"{HEAD}Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
    async with connections(server, SLOW, head) as readers:
        await check_neighbour_is_served(idle, server)
        assert {b"401"} <= set(await statuses(readers)) <= {b"401", b""}


async def test_connections_without_a_request_are_closed(idle: GatewayBench) -> None:
    """More connections than allowed: the oldest are closed first, the others at the deadline for a request's head."""
    idle.configure(gateway_connections=100)
    server = await idle.serve()
    async with connections(server, SLOW, "GET /healthz HTTP/1.1\r\nX-Slow: ") as readers:
        await check_neighbour_is_served(idle, server)
        assert set(await statuses(readers)) == {b""}
    await check_neighbour_is_served(idle, server)


async def test_slow_uploads_over_the_limit_of_connections_are_closed(idle: GatewayBench) -> None:
    """The limits of the key are high, so only the number of connections is limited: the slowest are closed."""
    idle.configure(gateway_rate_per_s=10_000, gateway_concurrency=1000, gateway_connections=100)
    server = await idle.serve()
    head = f"{HEAD}Authorization: Bearer {idle.token()}\r\nContent-Length: 1000000\r\n\r\n{{"
    async with connections(server, SLOW, head) as readers:
        await check_neighbour_is_served(idle, server)
        answers = await statuses(readers)
    assert set(answers) == {b"408", b""}
    assert answers.count(b"408") <= idle.settings.gateway_connections


async def test_malformed_and_broken_off_requests_are_refused(idle: GatewayBench) -> None:
    server = await idle.serve()
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


async def test_closed_connection_cancels_judging_and_frees_its_slot(idle: GatewayBench) -> None:
    idle.configure(gateway_in_flight=1, gateway_deadline_s=60)
    server = await idle.serve()
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
    server = await idle.serve()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=20) as client:
        for size in (200_000, 900_000, 1_500_000):
            answer = await client.post(PATH, content=b"x" * size, headers={"content-type": "application/json"})
            assert answer.status_code == 401
            with_key = {"content-type": "application/json", "authorization": f"Bearer {idle.token()}"}
            answer = await client.post(PATH, content=b"x" * size, headers=with_key)
            assert answer.status_code == (413 if size > idle.settings.gateway_body_limit_bytes else 400)


async def test_stopped_replica_accepts_no_connections_on_the_shared_port(idle: GatewayBench) -> None:
    server = await idle.serve()
    port = server.port
    with listen("127.0.0.1", port) as other:
        assert other.getsockname()[1] == port
    await server.stop()
    assert not server.is_serving
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0

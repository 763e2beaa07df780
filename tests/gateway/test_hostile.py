"""Hostile clients on real connections: they are refused within limits, and their neighbours do not notice."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import psutil
import pytest

from services.gateway.server import GatewayServer, listen
from tests.support.gateway_bench import JPEG, Bench, Gate

SLOW = 500
PATH = "/v1/assessments"
HEAD = "POST /v1/assessments?wait=5 HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/json\r\n"


@asynccontextmanager
async def connections(server: GatewayServer, count: int, head: str) -> AsyncIterator[list[asyncio.StreamReader]]:
    """Connections that each have sent this much, and stay."""
    opened = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(count)]
    try:
        for _, writer in opened:
            writer.write(head.encode())
        yield [reader for reader, _ in opened]
    finally:
        for _, writer in opened:
            writer.close()


async def statuses(readers: list[asyncio.StreamReader]) -> list[bytes]:
    """The status of each answer; empty where the connection was closed without one."""
    async with asyncio.timeout(30):
        answers = await asyncio.gather(*(reader.read() for reader in readers), return_exceptions=True)
    return [answer[9:12] if isinstance(answer, bytes) else b"" for answer in answers]


async def neighbour_is_served(idle: Bench, server: GatewayServer) -> None:
    """With a key, and a connection, of its own."""
    headers = {"Authorization": f"Bearer {idle.token(tenant='neighbour')}"}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", headers=headers, timeout=20) as client:
        answer = await client.post(f"{PATH}?wait=15", files={"file": ("a.jpg", JPEG)})
        assert answer.status_code == 200, answer.text


async def test_slow_uploads_with_one_key(idle: Bench) -> None:
    """Each says that it has a megabyte, and sends little of it."""
    idle.configure(gateway_rate_per_s=10_000)
    server = await idle.serve()
    before = psutil.Process().memory_info().rss
    head = f"{HEAD}Authorization: Bearer {idle.token()}\r\nContent-Length: 1000000\r\n\r\n" + " " * 1000
    async with connections(server, SLOW, head) as readers:
        await neighbour_is_served(idle, server)
        answers = await statuses(readers)
        assert psutil.Process().memory_info().rss - before < 200 << 20
    assert {b"408", b"429"} <= set(answers) <= {b"408", b"429", b""}, "an answer, or none where there are too many"
    assert answers.count(b"408") <= idle.settings.gateway_concurrency
    await neighbour_is_served(idle, server)


async def test_slow_uploads_with_no_key(idle: Bench) -> None:
    server = await idle.serve()
    head = f"{HEAD}Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
    async with connections(server, SLOW, head) as readers:
        await neighbour_is_served(idle, server)
        assert {b"401"} <= set(await statuses(readers)) <= {b"401", b""}


async def test_connections_that_never_ask_for_anything(idle: Bench) -> None:
    """There are more of them than may be open: the oldest make room, and all are closed in the end."""
    idle.configure(gateway_connections=100)
    server = await idle.serve()
    async with connections(server, SLOW, "GET /healthz HTTP/1.1\r\nX-Slow: ") as readers:
        await neighbour_is_served(idle, server)
        assert set(await statuses(readers)) == {b""}
    await neighbour_is_served(idle, server)


async def test_slow_uploads_on_every_connection(idle: Bench) -> None:
    """Their keys allow it, so only the number of connections is left: those that were slow for longest make room."""
    idle.configure(gateway_rate_per_s=10_000, gateway_concurrency=1000, gateway_connections=100)
    server = await idle.serve()
    head = f"{HEAD}Authorization: Bearer {idle.token()}\r\nContent-Length: 1000000\r\n\r\n{{"
    async with connections(server, SLOW, head) as readers:
        await neighbour_is_served(idle, server)
        answers = await statuses(readers)
    assert set(answers) == {b"408", b""}
    assert answers.count(b"408") <= idle.settings.gateway_connections


async def test_half_closed_and_broken_off(idle: Bench) -> None:
    server = await idle.serve()
    bearer = f"Authorization: Bearer {idle.token()}\r\n"
    for sent, half in (
        (f"{HEAD}{bearer}Content-Length: 100\r\n\r\n{{", True),
        (f"{HEAD}{bearer}Content-Length: 100\r\n\r\n{{", False),
        (f"{HEAD}{bearer}Transfer-Encoding: chunked\r\n\r\nzz\r\n", True),
        (f"{HEAD}{bearer}Content-Length: 2\r\n\r\n{{}}", True),
        ("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", True),
        ("GET / HTTP/1.1\r\n" + "X: y\r\n" * 10_000, True),
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(sent.encode("latin-1"))
        if half:
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
    await neighbour_is_served(idle, server)


async def test_whoever_goes_is_not_waited_for(idle: Bench) -> None:
    server = await idle.serve()
    gate = idle.guard.script = Gate()
    headers = {"Authorization": f"Bearer {idle.token()}"}
    part = {"type": "image_url", "image_url": {"url": idle.put("hostile/a.jpg")}}
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", headers=headers) as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post("/v1/moderations", json={"input": part}, timeout=httpx.Timeout(10, read=0.3))
    judge = idle.app.state.load_shedder
    async with asyncio.timeout(5):
        while judge.in_flight:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert gate.waiting <= 1


async def test_a_large_upload_that_is_refused_hears_why(idle: Bench) -> None:
    """The answer comes although the client still sends: a reset connection would say nothing."""
    server = await idle.serve()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=20) as client:
        for size in (200_000, 900_000, 1_500_000):
            answer = await client.post(PATH, content=b"x" * size, headers={"content-type": "application/json"})
            assert answer.status_code == 401
            lies = {"content-type": "application/json", "authorization": f"Bearer {idle.token()}"}
            answer = await client.post(PATH, content=b"x" * size, headers=lies)
            assert answer.status_code == (413 if size > idle.settings.gateway_body_limit_bytes else 400)


async def test_replicas_share_a_port_and_a_stopped_one_takes_no_more(idle: Bench) -> None:
    server = await idle.serve()
    port = server.port
    with listen("127.0.0.1", port) as other:
        assert other.getsockname()[1] == port
    await server.stop()
    assert not server.is_serving
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0

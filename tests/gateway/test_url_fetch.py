"""Images from URLs: which URLs are fetched, and how hosts can fail."""

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from services.gateway.body_memory import BodyMemory
from services.gateway.problems import HttpProblem
from services.gateway.url_fetch import Address, ImageDownloader, is_public
from tests.support.gateway_bench import JPEG, GatewayBench

OK = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(JPEG) + JPEG


class Host:
    """A host that answers with these bytes and records the requests. If it hangs, it never sends the last byte."""

    def __init__(self, answer: bytes, *, hangs: bool = False) -> None:
        self.answer = answer
        self.hangs = hangs
        self.requests: list[bytes] = []
        self.port = 0

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.requests.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(self.answer[:-1])
        if self.hangs:
            await reader.read()  # until the client closes the connection
        writer.write(self.answer[-1:])
        writer.close()


@asynccontextmanager
async def serve(answer: bytes = OK, *, hangs: bool = False) -> AsyncIterator[Host]:
    host = Host(answer, hangs=hangs)
    server = await asyncio.start_server(host.talk, "127.0.0.1", 0)
    host.port = server.sockets[0].getsockname()[1]
    try:
        yield host
    finally:
        server.close()


def resolve_to(*addresses: str) -> Callable[[str, int], Any]:
    async def resolve(_host: str, _port: int) -> list[str]:
        return list(addresses)

    return resolve


def any_address(_address: Address) -> bool:
    return True


async def fetch(downloader: ImageDownloader, url: str) -> bytes:
    with BodyMemory(100 << 20).lease("a") as lease:
        return await downloader.fetch(url, lease)


def build_downloader(hosts: list[str], **changes: Any) -> ImageDownloader:
    return ImageDownloader(hosts, **({"limit_bytes": 1 << 20, "deadline_s": 5} | changes))


async def test_only_urls_of_named_hosts_are_fetched() -> None:
    async with serve() as host:
        pictures = f"pictures.example:{host.port}"
        downloader = build_downloader([pictures], resolve=resolve_to("127.0.0.1"), may_connect=any_address)
        assert await fetch(downloader, f"http://{pictures}/a.jpg?b=c") == JPEG
        assert host.requests[0].startswith(b"GET /a.jpg?b=c HTTP/1.1\r\n")
        assert f"Host: {pictures}\r\n".encode() in host.requests[0]
        assert await fetch(downloader, f"http://PICTURES.example:{host.port}/") == JPEG
        for url in (
            "http://pictures.example/a.jpg",
            f"http://other.example:{host.port}/",
            f"http://pictures.example.evil:{host.port}/",
            f"http://{pictures}@127.0.0.1/",
            f"http://user@{pictures}/",
            f"http://:pass@{pictures}/",
            f"ftp://{pictures}/",
            f"http://{pictures}/a b",
            f"http://{pictures}/\r\nX: y",
            f"http://{pictures}/\u00e9",
            "http://pictures.example:99999/",
            "http://[::1/",
            "http://",
        ):
            with pytest.raises(HttpProblem) as refused:
                await fetch(downloader, url)
            assert refused.value.kind == "url-refused", url
        assert len(host.requests) == 2
        with pytest.raises(HttpProblem, match="does not fetch URLs"):
            await fetch(build_downloader([]), f"http://127.0.0.1:{host.port}/")
        assert len(host.requests) == 2


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "192.0.0.170", "198.18.0.1", "203.0.113.5", "224.0.0.1", "240.0.0.1", "255.255.255.255"),
        *("::", "::1", "fe80::1", "fd00:ec2::254", "fc00::1", "ff02::1", "2001:db8::1", "::ffff:127.0.0.1"),
        *(
            "64:ff9b::808:808",
            "::ffff:10.0.0.1",
            "2002:7f00:1::",
            "64:ff9b::7f00:1",
            "64:ff9b::a9fe:a9fe",
            "2001:0:a00:1::1",
        ),
        # Addresses that the table of Python 3.11.7 takes for public.
        *("fec0::1", "feff::1", "3fff::1", "3fff:fff:ffff::1", "192.0.0.8", "192.0.0.9", "192.0.0.10", "192.88.99.1"),
        *("::ffff:192.0.0.9", "2002:c000:8::", "::7f00:1", "::ffff:0:127.0.0.1", "5f00::1", "100::1", "4000::1"),
    ],
)
async def test_address_inside_the_network_is_refused(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
    for addresses in ([address], ["93.184.216.34", address]):
        downloader = build_downloader(["pictures.example"], resolve=resolve_to(*addresses))
        with pytest.raises(HttpProblem, match="that is not public"):
            await fetch(downloader, "http://pictures.example/")


@pytest.mark.parametrize(
    "address", ["93.184.216.34", "8.8.8.8", "2606:4700::1111", "2a00:1450:4001::1", "::ffff:8.8.8.8"]
)
def test_address_on_the_internet_is_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


async def test_host_name_is_resolved_once_for_each_request() -> None:
    """So a name server that changes its answer between the check and the connection (DNS rebinding) has no effect."""
    resolved: list[str] = []

    async def rebinding(host: str, _port: int) -> list[str]:
        resolved.append(host)
        return ["127.0.0.1"] if len(resolved) == 1 else ["10.0.0.1"]

    async with serve() as host:
        name = f"pictures.example:{host.port}"
        downloader = build_downloader(
            [name], resolve=rebinding, may_connect=lambda address: str(address) == "127.0.0.1"
        )
        assert await fetch(downloader, f"http://{name}/") == JPEG
        assert resolved == ["pictures.example"]
        with pytest.raises(HttpProblem, match="that is not public"):
            await fetch(downloader, f"http://{name}/")


@pytest.mark.parametrize(
    ("answer", "kind", "why"),
    [
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\nContent-Length: 0\r\n\r\n", "url-refused", "redirects"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "url-refused", "404"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\nab",
            "url-refused",
            "Content-Encoding",
        ),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"a" * 3000, "image-too-large", "2000 bytes"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nab", "url-refused", "did not deliver"),
        (b"SSH-2.0-OpenSSH_9.9\r\n\r\n", "url-refused", "did not deliver"),
    ],
)
async def test_bad_response_of_the_host_is_refused(answer: bytes, kind: str, why: str) -> None:
    async with serve(answer) as host:
        name = f"pictures.example:{host.port}"
        downloader = build_downloader(
            [name], limit_bytes=2000, resolve=resolve_to("127.0.0.1"), may_connect=any_address
        )
        with pytest.raises(HttpProblem, match=why) as refused:
            await fetch(downloader, f"http://{name}/")
        assert refused.value.kind == kind
        assert len(host.requests) == 1


async def test_slow_closed_or_unknown_host_is_refused() -> None:
    async with serve(hangs=True) as host:
        name = f"pictures.example:{host.port}"
        downloader = build_downloader([name], deadline_s=0.2, resolve=resolve_to("127.0.0.1"), may_connect=any_address)
        with pytest.raises(HttpProblem, match=r"within 0\.2 s"):
            await fetch(downloader, f"http://{name}/")
    with pytest.raises(HttpProblem, match="did not deliver"):
        await fetch(downloader, f"http://{name}/")
    with pytest.raises(HttpProblem, match="has no address"):
        await fetch(build_downloader(["pictures.example"], resolve=resolve_to()), "https://pictures.example/")
    with pytest.raises(HttpProblem, match="has no address"):
        await fetch(build_downloader(["no-such-host.invalid"]), "https://no-such-host.invalid/")


async def test_named_host_inside_the_network_is_refused_by_the_gateway(idle: GatewayBench) -> None:
    async with serve() as host:
        idle.configure(gateway_fetch_hosts=(f"localhost:{host.port}", f"127.0.0.1:{host.port}"))
        await idle.start()
        async with idle.client() as client:
            for name in ("localhost", "127.0.0.1"):
                part = {"type": "image_url", "image_url": {"url": f"http://{name}:{host.port}/a.jpg"}}
                answer = await client.post("/v1/moderations", json={"input": [part]})
                assert (answer.status_code, answer.json()["error"]["code"]) == (400, "url_refused")
                assert "that is not public" in answer.json()["error"]["message"]
        assert host.requests == []

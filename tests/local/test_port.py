"""The gateway's port, reserved for the replicas of one service."""

import asyncio
import socket

import pytest

from pipelines.local.port import reserve_port
from pipelines.local.up import make_gateway_url
from services.core.errors import ConfigurationError
from services.gateway.server import listen


def test_reserve_port_other_service_is_refused() -> None:
    with reserve_port("127.0.0.1", 0) as port:
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", port))
        with listen("127.0.0.1", port) as first, listen("127.0.0.1", port) as second:
            first.listen()
            second.listen()
            for _ in range(20):
                with socket.create_connection(("127.0.0.1", port), timeout=5):
                    pass  # the socket that reserves the port gets no connections
            with pytest.raises(ConfigurationError, match="SLUICE_GATEWAY_PORT"), reserve_port("127.0.0.1", port):
                pass
    with reserve_port("127.0.0.1", port) as again:
        assert again == port


def test_reserve_port_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="SLUICE_GATEWAY_HOST"), reserve_port("192.0.2.1", 0):
        pass


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::", "http://[::1]:80"),
        ("gateway.example", "http://gateway.example:80"),
    ],
)
def test_make_gateway_url_is_reachable_by_clients(host: str, url: str) -> None:
    assert make_gateway_url(host, 80) == url


async def test_listen_connections_have_tcp_nodelay() -> None:
    accepted = asyncio.get_running_loop().create_future()
    with listen("127.0.0.1", 0) as listener:
        server = await asyncio.start_server(lambda _, writer: accepted.set_result(writer), sock=listener)
        _, client = await asyncio.open_connection("127.0.0.1", listener.getsockname()[1])
        writer = await accepted
        assert writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        for each in (writer, client, server):
            each.close()

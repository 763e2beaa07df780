"""The middleware that receives the rest of a body that was refused unread."""

from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from services.core.settings import Settings
from services.gateway.middleware import DiscardUnreadBodyMiddleware

LIMIT_BYTES = 1000
DRAIN_LIMIT_BYTES = 4 * LIMIT_BYTES


class Client:
    """Sends a body in chunks of 500 bytes, and records the response."""

    def __init__(self, size_bytes: int, **headers: str) -> None:
        names = {"content-length": str(size_bytes)} | headers
        self.scope: Scope = {
            "type": "http",
            "headers": [(name.encode(), value.encode()) for name, value in names.items()],
        }
        self.left_bytes = size_bytes
        self.left_at_response_bytes = -1
        self.response: dict[str, Any] = {}

    async def receive(self) -> Message:
        chunk = b"x" * min(500, self.left_bytes)
        self.left_bytes -= len(chunk)
        return {"type": "http.request", "body": chunk, "more_body": self.left_bytes > 0}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.left_at_response_bytes = self.left_bytes
            self.response = {"status": message["status"], "headers": dict(message.get("headers", ()))}


async def refuse(_scope: Scope, _receive: Receive, send: Send) -> None:
    """Refuse a request without reading its body."""
    await send({"type": "http.response.start", "status": 413, "headers": []})
    await send({"type": "http.response.body"})


async def read_and_accept(_scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})


@pytest.fixture
def settings() -> Settings:
    return Settings(gateway_body_limit_bytes=LIMIT_BYTES)


async def test_refused_body_is_received_before_the_response(settings: Settings) -> None:
    client = Client(3 * LIMIT_BYTES)
    await DiscardUnreadBodyMiddleware(refuse, settings)(client.scope, client.receive, client.send)
    assert client.left_at_response_bytes == 0
    assert client.response == {"status": 413, "headers": {}}, "the connection can be used again"


async def test_refused_body_over_the_drain_limit_closes_the_connection(settings: Settings) -> None:
    client = Client(100 * LIMIT_BYTES)
    await DiscardUnreadBodyMiddleware(refuse, settings)(client.scope, client.receive, client.send)
    assert client.left_at_response_bytes == 100 * LIMIT_BYTES - DRAIN_LIMIT_BYTES
    assert client.response == {"status": 413, "headers": {b"connection": b"close"}}


async def test_refused_body_that_the_client_holds_back_is_not_awaited(settings: Settings) -> None:
    """With `Expect: 100-continue`, the client sends the body only after the gateway asks for it."""
    client = Client(2 * LIMIT_BYTES, expect="100-continue")
    await DiscardUnreadBodyMiddleware(refuse, settings)(client.scope, client.receive, client.send)
    assert client.left_at_response_bytes == 2 * LIMIT_BYTES
    assert client.response == {"status": 413, "headers": {b"connection": b"close"}}


async def test_body_that_was_read_leaves_the_response_unchanged(settings: Settings) -> None:
    client = Client(LIMIT_BYTES)
    await DiscardUnreadBodyMiddleware(read_and_accept, settings)(client.scope, client.receive, client.send)
    assert client.response == {"status": 200, "headers": {}}

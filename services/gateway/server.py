"""The HTTP server of one gateway: uvicorn, with limits on what comes before a request is known.

uvicorn bounds neither the time that a request's head may take nor the number of connections. Here a connection that
has no request is closed after a while, and when there are too many, the one makes room that has kept us waiting longest
for a request or for the rest of its body: so thousands of idle or slow connections take nothing from the others.
"""

import asyncio
import resource
import socket
from contextlib import suppress
from typing import Final

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from services.core import telemetry
from services.core.errors import ConfigurationError
from services.core.settings import Settings

HEAD_DEADLINE_S: Final = 10.0
_THEIR_TURN: Final = frozenset({h11.IDLE, h11.SEND_BODY})
_HEAD_LIMIT_BYTES: Final = 32 << 10
_KEEP_ALIVE_S: Final = 30
_OTHER_FILES: Final = 512
_BACKLOG: Final = 1024


class GatewayServer:
    """Serves an application on a socket until it is told to stop."""

    def __init__(
        self, app: ASGIApp, settings: Settings, *, listener: socket.socket, head_deadline_s: float = HEAD_DEADLINE_S
    ) -> None:
        _allow_files(settings.gateway_connections + _OTHER_FILES)
        self._listener = listener
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=limited(settings.gateway_connections, head_deadline_s),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=max(1, round(settings.drain_s)),
                h11_max_incomplete_event_size=_HEAD_LIMIT_BYTES,
                backlog=_BACKLOG,
            )
        )
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Return when requests are taken.

        Raises:
            ConfigurationError: it did not start.
        """
        self._task = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        while not self._server.started:
            if self._task.done():
                raise ConfigurationError("the gateway's HTTP server did not start; its log says why")
            await asyncio.sleep(0.01)

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    @property
    def is_serving(self) -> bool:
        return self._task is not None and not self._task.done() and not self._server.should_exit

    async def stop(self) -> None:
        """Take no more requests, and finish those that are here within the drain. Safe to repeat."""
        self._server.should_exit = True
        if self._task is not None:
            with suppress(asyncio.CancelledError):
                await asyncio.shield(self._task)
        self._listener.close()


def listen(host: str, port: int) -> socket.socket:
    """A socket on which several processes of one user may listen: they share the connections.

    Raises:
        ConfigurationError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        # asyncio does not see to it on sockets that it did not make: the end of an answer would wait 40 ms for an ACK.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"the gateway cannot listen on {host}:{port}: {error.strerror}; set SLUICE_GATEWAY_HOST and "
            "SLUICE_GATEWAY_PORT to an address of this machine that is free"
        ) from None
    listener.setblocking(False)
    return listener


def limited(connections: int, head_deadline_s: float) -> type[H11Protocol]:
    """uvicorn's protocol, with at most so many connections and so long for a request's head."""
    waiting: dict[H11Protocol, None] = {}

    class Limited(H11Protocol):
        """One connection."""

        _head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > connections:
                telemetry.GATEWAY_REFUSED.inc(1, {"reason": "too-many-connections"})
                oldest = next(iter(waiting), self)
                oldest.transport.abort()
                waiting.pop(oldest, None)
                if oldest is self:
                    return
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            waiting.pop(self, None)
            self._stop_timer()
            super().connection_lost(exc)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                waiting[self] = None  # kept alive, with a timer of uvicorn's own

        def _watch(self) -> None:
            """Whether the client is to send something, and since when."""
            if self.transport.is_closing() or self.conn.their_state not in _THEIR_TURN:
                waiting.pop(self, None)
                self._stop_timer()
            elif self.conn.their_state is h11.SEND_BODY:
                self._stop_timer()
            elif self._head_timer is None:
                waiting.pop(self, None)
                waiting[self] = None
                self._head_timer = self.loop.call_later(head_deadline_s, self._close_late)

        def _close_late(self) -> None:
            telemetry.GATEWAY_REFUSED.inc(1, {"reason": "head-too-slow"})
            self.transport.abort()

        def _stop_timer(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

    return Limited


def _allow_files(wanted: int) -> None:
    """Raise this process' limit on open files as far as it may be raised: each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))

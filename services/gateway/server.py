"""The HTTP server of one gateway: uvicorn, with limits on connections (connection_limits.py)."""

import asyncio
import resource
import socket
from contextlib import suppress
from typing import Final

import uvicorn
from fastapi import FastAPI

from services.core.errors import ConfigurationError
from services.core.settings import Settings
from services.gateway.connection_limits import ConnectionLimits, build_protocol
from services.gateway.flood_gate import FloodGate

HEAD_DEADLINE_S: Final = 10.0
"""From a new connection, or the first byte of a request, to the end of the request's head."""
WRITE_DEADLINE_S: Final = 10.0
"""A client must take the next part of a blocked response within this time."""
HEAD_LIMIT_BYTES: Final = 32 << 10
"""The size of the head of a request."""
_KEEP_ALIVE_S: Final = 30
_OTHER_FILES: Final = 512
"""Open files of this process that are not connections."""
_BACKLOG_CONNECTIONS: Final = 1024


class GatewayServer:
    """Serves an application of `services.gateway.app.create_app` on a socket until `stop` is called."""

    def __init__(
        self,
        app: FastAPI,
        settings: Settings,
        *,
        listener: socket.socket,
        head_deadline_s: float = HEAD_DEADLINE_S,
        write_deadline_s: float = WRITE_DEADLINE_S,
    ) -> None:
        limits = ConnectionLimits(settings.gateway_connections, head_deadline_s, write_deadline_s, HEAD_LIMIT_BYTES)
        _raise_file_limit(settings.gateway_connections + _OTHER_FILES)
        self._listener = listener
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=build_protocol(limits, FloodGate(app.state.is_welcome)),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=max(1, round(settings.drain_s)),
                backlog=_BACKLOG_CONNECTIONS,
            )
        )
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the server. Returns when it accepts requests.

        Raises:
            ConfigurationError: the server did not start.
        """
        self._task = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        while not self._server.started:
            if self._task.done():
                raise ConfigurationError("the gateway's HTTP server did not start; its log has the error")
            await asyncio.sleep(0.01)

    @property
    def port(self) -> int:
        """The port of the socket."""
        return int(self._listener.getsockname()[1])

    @property
    def is_serving(self) -> bool:
        """Whether the server accepts requests."""
        return self._task is not None and not self._task.done() and not self._server.should_exit

    async def stop(self) -> None:
        """Accept no more requests, and give the current ones SLUICE_DRAIN_S to finish. Safe to repeat."""
        self._server.should_exit = True
        if self._task is not None:
            with suppress(asyncio.CancelledError):
                await asyncio.shield(self._task)
        self._listener.close()


def listen(host: str, port: int) -> socket.socket:
    """Open a socket. Several processes of one user may listen on the same address and share the connections.

    Raises:
        ConfigurationError: the address is in use or not allowed.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        # asyncio sets this only on sockets that it opens. Without it, the end of a response waits 40 ms for an ACK.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"the gateway cannot listen on {host}:{port}: {error.strerror}; set SLUICE_GATEWAY_HOST and "
            "SLUICE_GATEWAY_PORT to a free address of this machine"
        ) from None
    listener.setblocking(False)
    return listener


def _raise_file_limit(wanted: int) -> None:
    """Raise this process' limit on open files to `wanted`, or as far as allowed. Each connection is an open file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))

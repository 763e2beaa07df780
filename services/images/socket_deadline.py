"""A deadline for a whole blocking HTTP exchange.

A socket timeout restarts with every byte, so a slow server can hold a thread for hours. Shutting the socket down wakes
the thread at once, both while it reads headers and while it reads the body.
"""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from botocore.awsrequest import (
    AWSHTTPConnection,
    AWSHTTPConnectionPool,
    AWSHTTPSConnection,
    AWSHTTPSConnectionPool,
)

T = TypeVar("T")
_current = threading.local()


class SocketDeadline:
    """Ends the HTTP exchange that runs under it.

    `expire` may be called from any thread, at any time, and never blocks.
    """

    def __init__(self) -> None:
        self.expired = False
        self._socket: socket.socket | None = None

    def run(self, step: Callable[[], T]) -> T:
        """Run `step` in this thread. `expire` closes the connection that `step` uses."""
        _current.socket_deadline = self
        try:
            return step()
        finally:
            _current.socket_deadline = None

    def attach(self, connected: socket.socket | None) -> None:
        """Make `connected` the socket that `expire` shuts down."""
        self._socket = connected
        if self.expired:
            self.expire()

    def expire(self) -> None:
        """Shut the socket down, so that a thread blocked on it continues with an error."""
        self.expired = True
        if self._socket is not None:
            with suppress(OSError, ValueError):  # already closed
                self._socket.shutdown(socket.SHUT_RDWR)


class _WatchedConnection:
    """A connection that registers its socket with the SocketDeadline of the current thread."""

    sock: socket.socket | None

    def request(self, *args: Any, **kwargs: Any) -> Any:
        result = super().request(*args, **kwargs)  # type: ignore[misc]
        socket_deadline: SocketDeadline | None = getattr(_current, "socket_deadline", None)
        if socket_deadline is not None:
            socket_deadline.attach(self.sock)
        return result


class _HTTPConnection(_WatchedConnection, AWSHTTPConnection):  # type: ignore[misc]  # botocore has no type information
    pass


class _HTTPSConnection(_WatchedConnection, AWSHTTPSConnection):  # type: ignore[misc]
    pass


class _HTTPPool(AWSHTTPConnectionPool):
    ConnectionCls = _HTTPConnection


class _HTTPSPool(AWSHTTPSConnectionPool):
    ConnectionCls = _HTTPSConnection


def watch_connections(client: Any) -> None:
    """Let a boto3 client use connections that a `SocketDeadline` can shut down.

    botocore has no public way to choose them. The tests of the deadline fail if a release of botocore removes this
    private attribute.
    """
    client._endpoint.http_session._pool_classes_by_scheme.update(http=_HTTPPool, https=_HTTPSPool)

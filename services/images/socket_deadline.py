"""Ends a blocking HTTP exchange from outside, at whatever byte it waits for.

A timeout of a socket starts anew with every byte, so a server that sends one now and then holds a thread for hours.
Shutting the socket down wakes that thread at once, in the headers as well as in the body.
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


class Cutoff:
    """Cuts the exchange that runs under it; `cut` may be called from any thread, at any time, and never blocks."""

    def __init__(self) -> None:
        self.is_cut = False
        self._socket: socket.socket | None = None

    def run(self, step: Callable[[], T]) -> T:
        """Run `step` in this thread; the connection that it uses is the one to cut."""
        _current.cutoff = self
        try:
            return step()
        finally:
            _current.cutoff = None

    def hold(self, connected: socket.socket | None) -> None:
        """From now on `connected` is what is cut."""
        self._socket = connected
        if self.is_cut:
            self.cut()

    def cut(self) -> None:
        """Let every wait for the other side end now."""
        self.is_cut = True
        if self._socket is not None:
            with suppress(OSError, ValueError):  # it is closed already
                self._socket.shutdown(socket.SHUT_RDWR)


class _Watched:
    """A connection that tells the cutoff of its thread which socket it uses."""

    sock: socket.socket | None

    def request(self, *args: Any, **kwargs: Any) -> Any:
        result = super().request(*args, **kwargs)  # type: ignore[misc]
        cutoff: Cutoff | None = getattr(_current, "cutoff", None)
        if cutoff is not None:
            cutoff.hold(self.sock)
        return result


class _HTTPConnection(_Watched, AWSHTTPConnection):  # type: ignore[misc]  # botocore has no type information
    pass


class _HTTPSConnection(_Watched, AWSHTTPSConnection):  # type: ignore[misc]
    pass


class _HTTPPool(AWSHTTPConnectionPool):
    ConnectionCls = _HTTPConnection


class _HTTPSPool(AWSHTTPSConnectionPool):
    ConnectionCls = _HTTPSConnection


def watch_connections(client: Any) -> None:
    """Let a boto3 client use connections that a `Cutoff` can cut.

    botocore has no public way to choose them. Should this one go away, a test of deadlines fails.
    """
    client._endpoint.http_session._pool_classes_by_scheme.update(http=_HTTPPool, https=_HTTPSPool)

"""Limits for connections that have no complete request: their number, and the time that a request's head may take.

uvicorn limits neither. Here, a connection without a request is closed after a while. If too many connections are open,
the connection that has kept the gateway waiting longest, for a request or the rest of a body, is closed. So thousands
of idle or slow connections take nothing from the others.
"""

import asyncio
from dataclasses import dataclass
from typing import ClassVar, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from services.core import telemetry

_CLIENT_SENDS: Final = frozenset({h11.IDLE, h11.SEND_BODY})
"""The states in which the gateway waits for the client."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """The limits of one server."""

    max_connections: int
    head_deadline_s: float


class LimitedProtocol(H11Protocol):
    """One connection. Use a subclass from `build_protocol`."""

    limits: ClassVar[ConnectionLimits]
    waiting: "ClassVar[dict[LimitedProtocol, None]]"
    """The server's connections that wait for the client, in the order in which they began to wait."""
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            telemetry.GATEWAY_REFUSED.inc(1, {"reason": "too-many-connections"})
            oldest = next(iter(self.waiting), self)
            oldest.transport.abort()
            self.waiting.pop(oldest, None)
            if oldest is self:
                return
        self._update_waiting()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self.waiting.pop(self, None)
        self._stop_head_timer()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.waiting[self] = None  # kept alive; uvicorn has a timer for this

    def _update_waiting(self) -> None:
        """Note whether the connection waits for the client, and start or stop the timer for a request's head."""
        if self.transport.is_closing() or self.conn.their_state not in _CLIENT_SENDS:
            self.waiting.pop(self, None)
            self._stop_head_timer()
        elif self.conn.their_state is h11.SEND_BODY:
            self._stop_head_timer()
        elif self._head_timer is None:
            self.waiting.pop(self, None)
            self.waiting[self] = None
            self._head_timer = self.loop.call_later(self.limits.head_deadline_s, self._close_slow_head)

    def _close_slow_head(self) -> None:
        telemetry.GATEWAY_REFUSED.inc(1, {"reason": "head-too-slow"})
        self.transport.abort()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def build_protocol(limits: ConnectionLimits) -> type[LimitedProtocol]:
    """Return uvicorn's HTTP protocol with these limits."""
    return type("LimitedProtocol", (LimitedProtocol,), {"limits": limits, "waiting": {}})

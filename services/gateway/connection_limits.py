"""Limits for connections whose client keeps the gateway waiting, in either direction.

uvicorn has none of these limits:

- A connection without a complete head of a request is closed after a while.
- A head that is larger than the limit is refused, also if all of it arrives at once. h11 itself refuses a head only if
  it is incomplete at the limit.
- A body in many tiny chunks is refused, because each chunk takes as long to parse as kilobytes of a larger one.
- A connection whose client does not take the response is closed after a while.
- If too many connections are open, the connection that has kept the gateway waiting longest is closed: for a request,
  for the rest of a body, or until its client takes a response. Connections that a flood gate holds are closed first.
- A client may send the next request before the response (pipelining) only after a request with a valid API key.
- If too many requests are refused for their API keys, further ones wait unread (flood_gate.py).

So idle or slow connections make room for others.
"""

import asyncio
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from services.core import telemetry
from services.gateway.flood_gate import REFUSED_PER_S, FloodGate

_CLIENT_SENDS: Final = frozenset({h11.IDLE, h11.SEND_BODY})
"""The states in which the gateway waits for the client to send."""
_MAY_RESPOND: Final = frozenset({h11.IDLE, h11.SEND_RESPONSE})
"""The gateway's states in which a response can begin."""
_WRITE_PROGRESS_BYTES: Final = 16 << 10
"""A client that takes fewer bytes of a response than this within the deadline for writes is closed."""
_FREE_CHUNKS: Final = 1_000
_CHUNK_BYTES: Final = 64
"""A chunked body may have `_FREE_CHUNKS` chunks of any size, and one more for each `_CHUNK_BYTES` of its bytes."""
_CROWDED_SHARE: Final = 0.75
"""If more connections than this share of the limit are open, a connection is kept only after a valid API key."""
HAS_API_KEY: Final = "has_api_key"
"""The entry of `request.state` that is true after the API key of a request was found valid."""
IS_OVER_RATE: Final = "is_over_rate"
"""The entry of `request.state` that is true if the request was refused because its API key is over its rate."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """The limits of one server."""

    max_connections: int
    head_deadline_s: float
    write_deadline_s: float
    """A blocked response must go on within this time."""
    head_bytes: int
    """The method, the target and the header fields of a request may have this many bytes."""


class LimitedConnection(h11.Connection):
    """The HTTP grammar of one connection, with limits on the head and the chunks of each request."""

    def __init__(self, head_bytes: int) -> None:
        super().__init__(h11.SERVER, head_bytes)
        self._head_bytes = head_bytes
        self._chunks = 0
        self._body_bytes = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Data):
            self._chunks += event.chunk_start
            self._body_bytes += len(event.data)
            if self._chunks > _FREE_CHUNKS + self._body_bytes // _CHUNK_BYTES:
                telemetry.GATEWAY_REFUSED.inc(1, {"reason": "chunks-too-small"})
                raise h11.RemoteProtocolError("the chunks are too small", error_status_hint=400)
        elif isinstance(event, h11.Request):
            self._chunks = self._body_bytes = 0
            fields = sum(len(name) + len(value) + len(b": \r\n") for name, value in event.headers)
            if len(event.method) + len(event.target) + fields > self._head_bytes:
                telemetry.GATEWAY_REFUSED.inc(1, {"reason": "head-too-large"})
                raise h11.RemoteProtocolError("the head is too large", error_status_hint=431)
        return event


class LimitedProtocol(H11Protocol):
    """One connection. Use a subclass from `build_protocol`."""

    limits: ClassVar[ConnectionLimits]
    gate: ClassVar[FloodGate]
    waiting: "ClassVar[dict[LimitedProtocol, None]]"
    """The server's connections that wait for the client, in the order in which they began to wait."""
    held: "ClassVar[dict[LimitedProtocol, bytes]]"
    """The connections whose request waits for the gate, and the bytes of the request that have arrived."""
    _is_scheduled: ClassVar[bool] = False
    """Whether the next of `held` will be read soon."""
    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _unsent_bytes = 0
    """Bytes of responses that the client had not taken when the write timer was started."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = LimitedConnection(self.limits.head_bytes)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            telemetry.GATEWAY_REFUSED.inc(1, {"reason": "too-many-connections"})
            oldest = next(iter(self.held), None) or next(iter(self.waiting), self)
            oldest.transport.abort()
            self.waiting.pop(oldest, None)
            self.held.pop(oldest, None)
            if oldest is self:
                return
        self._update_waiting()

    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is h11.IDLE and (self in self.held or not self.gate.admits(data)):
            self._hold(data)
        else:
            super().data_received(data)
        self._update_waiting()

    def _hold(self, data: bytes) -> None:
        self.flow.pause_reading()
        self.held[self] = self.held.get(self, b"") + data
        self._schedule_held()

    @classmethod
    def _schedule_held(cls) -> None:
        if cls.held and not cls._is_scheduled:
            cls._is_scheduled = True
            asyncio.get_running_loop().call_later(1 / REFUSED_PER_S, cls._read_held)

    @classmethod
    def _read_held(cls) -> None:
        """Read the request that waits longest, if the gate is open. Repeat until none waits."""
        cls._is_scheduled = False
        if cls.held and cls.gate.is_open:
            oldest = next(iter(cls.held))
            data = cls.held.pop(oldest)
            if not oldest.transport.is_closing():
                oldest.flow.resume_reading()
                super(LimitedProtocol, oldest).data_received(data)
                oldest._update_waiting()
        cls._schedule_held()

    def connection_lost(self, exc: Exception | None) -> None:
        self.waiting.pop(self, None)
        self.held.pop(self, None)
        self._stop_head_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self.gate.count_refused()
        if self.conn.our_state in _MAY_RESPOND:
            super().send_400_response(msg)
        else:
            self.transport.abort()  # the response has begun, so no other one can be sent

    def on_response_complete(self) -> None:
        state = self.scope["state"]
        if not state.get(HAS_API_KEY) or state.get(IS_OVER_RATE):
            self.gate.count_refused()
        if not state.get(HAS_API_KEY) and not self.transport.is_closing():
            is_pipelined = self.conn.their_state is h11.DONE and self.conn.trailing_data[0]
            is_crowded = len(self.connections) > _CROWDED_SHARE * self.limits.max_connections
            if is_pipelined:
                telemetry.GATEWAY_REFUSED.inc(1, {"reason": "pipelined-without-api-key"})
            if is_pipelined or is_crowded:
                self.conn.send(h11.ConnectionClosed())
                self.transport.close()
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_write()  # a closing connection stays open until its client has taken the response
        elif self.conn.their_state is h11.IDLE:
            self.waiting[self] = None  # kept alive; uvicorn has a timer for this

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_write()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_write_timer()
            self.waiting.pop(self, None)
            if self.conn.their_state in _CLIENT_SENDS:
                self.waiting[self] = None

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_write()

    def _watch_write(self) -> None:
        """Close the connection if its client does not take the response. Until then it may be closed for others."""
        self.waiting.setdefault(self)
        if self._write_timer is None:
            self._start_write_timer()

    def _start_write_timer(self) -> None:
        self._unsent_bytes = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(self.limits.write_deadline_s, self._check_write_progress)

    def _check_write_progress(self) -> None:
        if self._unsent_bytes - self.transport.get_write_buffer_size() >= _WRITE_PROGRESS_BYTES:
            self._start_write_timer()
            return
        telemetry.GATEWAY_REFUSED.inc(1, {"reason": "response-not-taken"})
        self.transport.abort()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _update_waiting(self) -> None:
        """Note whether the connection waits for the client, and start or stop the timer for a request's head."""
        if self.transport.is_closing():
            self._stop_head_timer()
            self._watch_write()
        elif self.conn.their_state not in _CLIENT_SENDS:
            if not self.flow.write_paused:
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


def build_protocol(limits: ConnectionLimits, gate: FloodGate) -> type[LimitedProtocol]:
    """Return uvicorn's HTTP protocol with these limits."""
    return type("LimitedProtocol", (LimitedProtocol,), {"limits": limits, "gate": gate, "waiting": {}, "held": {}})

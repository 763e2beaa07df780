"""The protocol between a decoder process and its parent: frames of JSON and raw bytes over a socket.

It does not use pickle: the decoder reads hostile bytes, so its answers must not run code in the parent.
"""

import json
import socket
import struct
import time
from typing import Any, Final

from services.core.values import ImageFacts, PreparedImage

_LENGTHS: Final = struct.Struct(">II")
_HEAD_LIMIT_BYTES: Final = 1 << 16


class ProtocolError(Exception):
    """The peer closed the connection, or broke the protocol."""


class Channel:
    """One end of a connected socket. If `deadline` (of time.monotonic) is set, every wait ends then."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.deadline: float | None = None

    def send(self, head: dict[str, Any], body: bytes) -> None:
        """Send one frame. Raises OSError when the peer closed the connection, TimeoutError after the deadline."""
        encoded = json.dumps(head).encode()
        self._wait_until_deadline()
        self._connection.sendall(_LENGTHS.pack(len(encoded), len(body)) + encoded)
        self._wait_until_deadline()
        self._connection.sendall(body)

    def receive(self, body_limit_bytes: int) -> tuple[dict[str, Any], bytes]:
        """Receive one frame. Raises ProtocolError, OSError, and TimeoutError after the deadline."""
        head_size, body_size = _LENGTHS.unpack(self._receive(_LENGTHS.size))
        if head_size > _HEAD_LIMIT_BYTES or body_size > body_limit_bytes:
            raise ProtocolError(
                f"a frame has {head_size} + {body_size} bytes; the limit is {_HEAD_LIMIT_BYTES} + {body_limit_bytes}"
            )
        try:
            head = json.loads(self._receive(head_size))
        except (ValueError, RecursionError):
            raise ProtocolError("a frame is not JSON") from None
        if not isinstance(head, dict):
            raise ProtocolError("a frame is not a JSON object")
        return head, self._receive(body_size)

    def close(self) -> None:
        """Close the socket."""
        self._connection.close()

    def _receive(self, size: int) -> bytes:
        content = bytearray(size)
        missing = memoryview(content)
        while missing:
            self._wait_until_deadline()
            received = self._connection.recv_into(missing)
            if received == 0:
                raise ProtocolError("the peer closed the connection")
            missing = missing[received:]
        return bytes(content)

    def _wait_until_deadline(self) -> None:
        if self.deadline is not None:
            left_s = self.deadline - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            self._connection.settimeout(left_s)


def to_fields(image: PreparedImage) -> dict[str, Any]:
    """The JSON fields of a prepared image; its bytes are sent separately."""
    return {
        "media_type": image.media_type,
        "width": image.width,
        "height": image.height,
        "sha256": image.sha256,
        "facts": image.facts.model_dump(),
    }


def from_fields(head: dict[str, Any], data: bytes) -> PreparedImage:
    """The inverse of `to_fields`. Raises ProtocolError."""
    try:
        return PreparedImage(
            data=data,
            media_type="image/png" if head["media_type"] == "image/png" else "image/jpeg",
            width=int(head["width"]),
            height=int(head["height"]),
            sha256=str(head["sha256"]),
            facts=ImageFacts.model_validate(head["facts"]),
        )
    except (KeyError, TypeError, ValueError):
        raise ProtocolError("an answer is not a prepared image") from None

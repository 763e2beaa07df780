"""What a decoding process and its parent say to each other: frames of JSON and raw bytes over a socket.

No pickle: nothing that comes back from a process that read hostile bytes can run code in its parent.
"""

import json
import socket
import struct
import time
from typing import Any, Final

from services.core.messages import ImageFacts, PreparedImage

_LENGTHS: Final = struct.Struct(">II")
_HEAD_LIMIT_BYTES: Final = 1 << 16


class Broken(Exception):
    """The other side is gone, or does not keep to the protocol."""


class Channel:
    """One end of a connected socket; every wait ends at `deadline` (of time.monotonic) where one is set."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.deadline: float | None = None

    def send(self, head: dict[str, Any], body: bytes) -> None:
        """Send one frame. Raises OSError when the other side is gone, TimeoutError after the deadline."""
        encoded = json.dumps(head).encode()
        self._wait_until_deadline()
        self._connection.sendall(_LENGTHS.pack(len(encoded), len(body)) + encoded)
        self._wait_until_deadline()
        self._connection.sendall(body)

    def receive(self, body_limit: int) -> tuple[dict[str, Any], bytes]:
        """Receive one frame. Raises Broken, OSError, and TimeoutError after the deadline."""
        head_size, body_size = _LENGTHS.unpack(self._receive(_LENGTHS.size))
        if head_size > _HEAD_LIMIT_BYTES or body_size > body_limit:
            raise Broken("a frame is larger than agreed")
        try:
            head = json.loads(self._receive(head_size))
        except (ValueError, RecursionError):
            raise Broken("a frame is not JSON") from None
        if not isinstance(head, dict):
            raise Broken("a frame is not a JSON object")
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
                raise Broken("the other side is gone")
            missing = missing[received:]
        return bytes(content)

    def _wait_until_deadline(self) -> None:
        if self.deadline is not None:
            left_s = self.deadline - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            self._connection.settimeout(left_s)


def described(image: PreparedImage) -> dict[str, Any]:
    """A prepared image without its bytes, as JSON."""
    return {
        "media_type": image.media_type,
        "width": image.width,
        "height": image.height,
        "sha256": image.sha256,
        "facts": image.facts.model_dump(),
    }


def restored(head: dict[str, Any], data: bytes) -> PreparedImage:
    """The inverse of `described`. Raises Broken."""
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
        raise Broken("an answer is not a prepared image") from None

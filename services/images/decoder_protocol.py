"""The protocol between a decoder process and its parent: frames of JSON and raw bytes over a socket.

It does not use pickle: the decoder reads hostile bytes, so its answers must not run code in the parent.
"""

import json
import re
import socket
import struct
import time
from typing import Any, Final, Literal, get_args

from services.core.values import ImageFacts, PreparedImage
from services.images.image_format import Format, detect_format

_LENGTHS: Final = struct.Struct(">II")
_HEAD_LIMIT_BYTES: Final = 1 << 16
_NUMBER_LIMIT: Final = 1 << 31
_DETAIL_LIMIT: Final = 500
_FORMATS: Final = frozenset(get_args(Format))
_MEDIA_TYPES: Final[dict[str, tuple[Literal["image/jpeg", "image/png"], Format]]] = {
    "image/jpeg": ("image/jpeg", "jpeg"),
    "image/png": ("image/png", "png"),
}
_SHA256: Final = re.compile("[0-9a-f]{64}")


class ProtocolError(Exception):
    """The peer closed the connection, or broke the protocol."""


class ConnectionClosedError(ProtocolError):
    """The peer closed the connection."""


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
                raise ConnectionClosedError("the peer closed the connection")
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
    """The inverse of `to_fields`. A peer that was taken over may have sent anything. Raises ProtocolError."""
    facts, sha256, media_type = head.get("facts"), head.get("sha256"), head.get("media_type")
    if not isinstance(facts, dict) or not isinstance(facts.get("format"), str) or facts["format"] not in _FORMATS:
        raise ProtocolError("an answer has no facts of an image")
    if not isinstance(sha256, str) or _SHA256.fullmatch(sha256) is None:
        raise ProtocolError("an answer has no digest of an image")
    if not isinstance(media_type, str) or media_type not in _MEDIA_TYPES:
        raise ProtocolError("an answer has no known media type")
    known, kind = _MEDIA_TYPES[media_type]
    if detect_format(data) != kind:
        raise ProtocolError(f"an answer says {known}, but its bytes are something else")
    return PreparedImage(
        data=data,
        media_type=known,
        width=_read_number(head, "width"),
        height=_read_number(head, "height"),
        sha256=sha256,
        facts=ImageFacts(
            width=_read_number(facts, "width"),
            height=_read_number(facts, "height"),
            format=facts["format"],
            frames=_read_number(facts, "frames"),
        ),
    )


def read_detail(head: dict[str, Any]) -> str:
    """The text of a rejection: bounded, and without control characters. Raises ProtocolError."""
    detail = head.get("detail")
    if not isinstance(detail, str):
        raise ProtocolError("a rejection has no text")
    return "".join(character if character.isprintable() else "?" for character in detail[:_DETAIL_LIMIT])


def _read_number(fields: dict[str, Any], name: str) -> int:
    number = fields.get(name)
    if type(number) is not int or not 1 <= number <= _NUMBER_LIMIT:  # not bool, and not 1e9 or Infinity
        raise ProtocolError(f"an answer has no number from 1 to {_NUMBER_LIMIT} as {name}")
    return number

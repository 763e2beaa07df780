"""Shared by the consumer, producer and reader of Redis Streams: connection, outages, and the format of an entry."""

import asyncio
import base64
import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final, Self

from redis import exceptions
from redis.asyncio import Redis
from redis.maint_notifications import MaintNotificationsConfig

from services.core.errors import ConfigurationError, StreamUnavailable
from services.core.redis import redis_client
from services.core.retry import backoff
from services.streams.base import Headers, Message, OutgoingMessage
from services.streams.config import StreamConfig

CONNECT_S: Final = 15.0
"""How long opening waits for the server before it gives up."""

MAX_BACKOFF_S: Final = 2.0
"""The longest pause between tries while the server is unavailable."""

_ANSWER_S: Final = 10.0
"""A server that does not answer for this long is unavailable. A blocking read may take its own time longer."""

_MAX_CONNECTIONS: Final = 32

_HEADERS_LIMIT: Final = 1000
"""One XADD in a script takes no more arguments. Further headers go into one field, `more-headers`."""

_OUTAGES: Final = (
    exceptions.ConnectionError,  # also loading, and too many clients
    exceptions.TimeoutError,
    exceptions.ReadOnlyError,  # a failover: the master became a replica
    exceptions.OutOfMemoryError,
    exceptions.ClusterDownError,
    exceptions.TryAgainError,
    OSError,
)
_OUTAGE_CODES: Final = ("MISCONF", "NOREPLICAS", "BUSY", "UNBLOCKED", "UNKILLABLE", "NOTREADY")


def is_outage(error: BaseException) -> bool:
    """Whether a retry can help: the server is unreachable, starting, full, or no longer the master."""
    if isinstance(error, exceptions.AuthenticationError | exceptions.AuthorizationError):
        return False
    if isinstance(error, _OUTAGES):
        return True
    return isinstance(error, exceptions.ResponseError) and str(error).split(" ")[0] in _OUTAGE_CODES


def is_missing_group(error: BaseException) -> bool:
    """Whether the stream or its group is gone: the server lost its data, or someone deleted them."""
    text = str(error)
    return isinstance(error, exceptions.ResponseError) and ("NOGROUP" in text or "no such key" in text)


def make_client(url: str, *, connections: int) -> "Redis":
    """A client that sends each command once: the caller decides about retries.

    Raises:
        ConfigurationError: the URL is wrong.
    """
    client = redis_client(
        url,
        setting="SLUICE_STREAM_URL",
        connections=connections,
        timeout_s=_ANSWER_S,
        socket_connect_timeout=5,
        socket_keepalive=True,
        health_check_interval=0,
        maint_notifications_config=MaintNotificationsConfig(enabled=False),  # they need RESP 3
        decode_responses=False,
    )
    chosen = client.connection_pool.connection_kwargs
    if chosen["protocol"] != 2 or chosen["decode_responses"]:
        raise ConfigurationError("SLUICE_STREAM_URL must not set protocol or decode_responses; remove them")
    # By default the client returns entries as dicts, which drop repeated fields.
    for command in ("XREADGROUP", "XREAD", "XRANGE", "XREVRANGE"):
        client.set_response_callback(command, _return_unchanged)  # type: ignore[arg-type]
    return client


def _return_unchanged(reply: Any, **_: Any) -> Any:
    return reply


def map_error(error: Exception) -> Exception:
    """Return Sluice's error for the error of a command; an error that none of them describes is returned unchanged."""
    if is_outage(error):
        return StreamUnavailable(f"Redis does not answer: {str(error) or type(error).__name__}.")
    if isinstance(error, exceptions.AuthenticationError | exceptions.AuthorizationError | exceptions.NoPermissionError):
        return ConfigurationError(f"Redis rejects the credentials in SLUICE_STREAM_URL: {error}.")
    if isinstance(error, exceptions.ResponseError):
        return ConfigurationError(
            f"Redis rejects a command: {error}. Correct the server's version, its configuration or the user's rights."
        )
    return error


def encode_entry(record: OutgoingMessage) -> list[bytes]:
    """The fields and values of a record's entry, one after the other."""
    fields = [b"value", record.value]
    if record.key is not None:
        fields += [b"key", record.key]
    for name, value in record.headers[:_HEADERS_LIMIT]:
        fields += [b"header:" + name.encode(), value]
    if len(record.headers) > _HEADERS_LIMIT:
        rest = [(name, base64.b64encode(value).decode()) for name, value in record.headers[_HEADERS_LIMIT:]]
        fields += [b"more-headers", json.dumps(rest).encode()]
    return fields


def decode_entry(stream: str, id_: bytes, fields: Sequence[bytes], *, attempts: int = 1, token: Any = None) -> Message:
    """The message in an entry.

    An unknown field becomes the header `field:<name>`, and a missing `value` becomes an empty one. So the dead letter
    of an entry of another form keeps all of its content.
    """
    value, key = b"", None
    headers: list[tuple[str, bytes]] = []
    for name, content in zip(fields[::2], fields[1::2], strict=True):
        if name == b"value":
            value = content
        elif name == b"key":
            key = content
        elif name.startswith(b"header:"):
            headers.append((_decode_name(name.removeprefix(b"header:")), content))
        elif name == b"more-headers" and (more := _parse_more_headers(content)) is not None:
            headers += more
        else:
            headers.append((f"field:{_decode_name(name)}", content))
    milliseconds = int(id_.split(b"-")[0])
    return Message(
        value=value,
        key=key,
        headers=tuple(headers),
        source=f"{stream}/{id_.decode()}",
        timestamp=_parse_timestamp(milliseconds),
        attempts=attempts,
        token=token,
    )


def _decode_name(name: bytes) -> str:
    return name.decode(errors="backslashreplace")


def _parse_timestamp(milliseconds: int) -> datetime:
    try:
        return datetime.fromtimestamp(milliseconds / 1000, UTC)
    except (OverflowError, ValueError, OSError):  # a producer may choose any id
        return datetime.now(UTC)


def _parse_more_headers(content: bytes) -> Headers | None:
    try:
        return tuple((str(name), base64.b64decode(value, validate=True)) for name, value in json.loads(content))
    except (ValueError, TypeError):
        return None


async def open_client(config: StreamConfig) -> Redis:
    """A client of the server in SLUICE_STREAM_URL. Waits until the server answers.

    Raises:
        ConfigurationError: the URL or the credentials are wrong.
        StreamUnavailable: the server did not answer in time.
    """
    # Settling takes milliseconds, so few connections serve many messages; a blocking read holds one.
    client = make_client(config.url, connections=min(_MAX_CONNECTIONS, 4 + config.in_flight))
    try:
        await connect(client)
    except Exception:
        await client.aclose(close_connection_pool=True)
        raise
    return client


async def connect(client: Redis) -> None:
    """Wait for the server.

    Raises:
        StreamUnavailable: it did not answer within 15 s.
        ConfigurationError: it rejects the credentials.
    """
    deadline = time.monotonic() + CONNECT_S
    for delay in backoff(MAX_BACKOFF_S):
        try:
            await client.ping()
        except (exceptions.RedisError, OSError) as error:
            failure = map_error(error)
            if not isinstance(failure, StreamUnavailable) or time.monotonic() + delay > deadline:
                raise failure from error
            await asyncio.sleep(delay)
        else:
            return


class RedisConnection:
    """The connections of a publisher or a reader, which are no members of a group."""

    def __init__(self, client: Redis) -> None:
        """Use `open`, which connects."""
        self._client = client

    @classmethod
    async def open(cls, config: StreamConfig) -> Self:
        """Connect.

        Raises:
            ConfigurationError: the URL or the credentials are wrong.
            StreamUnavailable: the server did not answer in time.
        """
        return cls(await open_client(config))

    async def close(self) -> None:
        """Release the connections."""
        await self._client.aclose(close_connection_pool=True)

"""Refuses huge values of a Redis that others can write to, before they take memory. No other module knows the parsers.

Scripts bound what they return (`services.core.redis.READ_FUNCTIONS`). An announcement has no such bound: a script of
somebody else can publish one of any size, and Redis limits neither its size nor what one subscriber gets at a time.
"""

from typing import Any, Final

from redis._parsers import _AsyncRESP2Parser, _AsyncRESP3Parser
from redis.exceptions import ConnectionError as RedisConnectionError

VALUE_LIMIT_BYTES: Final = 16 << 20
"""No process writes a value of more than 1 MiB."""


class _LimitedReads:
    """A parser whose connection is closed instead of reading a huge value."""

    async def _read(self, length: int) -> Any:
        if length > VALUE_LIMIT_BYTES:
            raise RedisConnectionError(
                f"closed a connection on which a value of {length} bytes arrives; the limit is {VALUE_LIMIT_BYTES} "
                "bytes. Find out who can write to Redis"
            )
        return await super()._read(length)  # type: ignore[misc]


class _Resp2Parser(_LimitedReads, _AsyncRESP2Parser): ...


class _Resp3Parser(_LimitedReads, _AsyncRESP3Parser): ...


def limit_values(connection_options: dict[str, Any]) -> None:
    """Have the connections of a pool refuse huge values, for either protocol of redis-py."""
    is_third = str(connection_options.get("protocol")) == "3"
    connection_options["parser_class"] = _Resp3Parser if is_third else _Resp2Parser

"""The Redis at SLUICE_REDIS_URL, which the processes of a deployment share: clients, Lua scripts, and one error.

Redis Streams (services/streams/redis) makes its clients here too, but maps errors itself, because it has to know which
commands may be repeated.

Others may be able to write to this Redis. One huge value would take the memory and the time of every process that reads
it, so scripts read values only with `READ_FUNCTIONS`.
"""

from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Final, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from services.core.errors import ConfigurationError, RedisUnavailable
from services.core.redis_replies import limit_values

_CONNECTIONS: Final = 8
TIMEOUT_S: Final = 2.0
"""The limit for connecting, and for each answer."""

READ_FUNCTIONS: Final = """
local function read(key, limit, instead)
  local size = redis.pcall('STRLEN', key)
  if type(size) == 'number' and size <= tonumber(limit) then return redis.call('GET', key) end
  return instead
end
local function read_field(key, field, limit, instead)
  local size = redis.pcall('HSTRLEN', key, field)
  if type(size) == 'number' and size <= tonumber(limit) then return redis.call('HGET', key, field) end
  return instead
end
"""
"""Lua functions for the head of a script. Both return `false` for an absent value.

They return `instead` for a value of more than `limit` bytes, or of another type than a string or a hash.
"""

T = TypeVar("T")


def redis_client(url: str, *, setting: str, connections: int, timeout_s: float, **options: Any) -> "Redis":
    """A client that sends each command once. It connects at the first command.

    Args:
        url: the server's URL. Its query may override `options`.
        setting: the setting that has the URL, for the error message.
        connections: the limit. A command waits up to `timeout_s` for a free one.
        timeout_s: the limit for connecting, and for each answer.
        options: further options of redis-py's connections.

    Raises:
        ConfigurationError: the URL is invalid.
    """
    defaults = {
        "timeout": timeout_s,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }
    try:
        return Redis.from_pool(BlockingConnectionPool.from_url(url, max_connections=connections, **defaults | options))
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"{setting} is wrong: {error}") from None


@contextmanager
def map_redis_errors() -> Iterator[None]:
    """Raise every error of the Redis at SLUICE_REDIS_URL as RedisUnavailable."""
    try:
        yield
    except (RedisError, OSError, TimeoutError) as error:
        detail = str(error) or type(error).__name__
        raise RedisUnavailable(f"Redis (SLUICE_REDIS_URL) does not answer: {detail}") from error


class RedisClient:
    """A client of the Redis at SLUICE_REDIS_URL, for keys that begin with one prefix.

    Every asynchronous method raises RedisUnavailable if Redis does not answer.
    """

    def __init__(self, url: str, prefix: str, *, timeout_s: float = TIMEOUT_S) -> None:
        """
        Raises:
            ConfigurationError: the URL is invalid.
        """
        self.client = redis_client(url, setting="SLUICE_REDIS_URL", connections=_CONNECTIONS, timeout_s=timeout_s)
        limit_values(self.client.connection_pool.connection_kwargs)
        self._prefix = prefix
        self._script = cache(self.client.register_script)

    async def close(self) -> None:
        """Close the connections."""
        await self.client.aclose()

    def key(self, *parts: str) -> str:
        """The name of a key: the prefix, and the parts with colons between them."""
        return self._prefix + ":".join(parts)

    async def run(self, script: str, keys: Sequence[str], *arguments: str | bytes | float) -> Any:
        """Run a Lua script on the server, and return its result."""
        return await self.call(self._script(script)(keys, arguments))

    async def call(self, command: Awaitable[T]) -> T:
        """Await a command of `client`."""
        with map_redis_errors():
            return await command

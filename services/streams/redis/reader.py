"""Reads whole Redis streams without being a member of a group."""

from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any, Final

from redis import exceptions

from services.streams.base import Message
from services.streams.redis.client import RedisConnection, decode_entry, map_error

_BLOCK_S: Final = 1.0
_READ_BATCH: Final = 100


class RedisReader(RedisConnection):
    """Reads whole streams without being a member. See `Reader`."""

    async def read(self, stream: str, *, follow: bool, since: datetime | None = None) -> AsyncIterator[Message]:
        """In the order of the ids."""
        try:
            newest: Any = await self._client.xrevrange(stream, count=1)
            end = newest[0][0] if newest else b"0-0"
            first = b"-" if since is None else str(max(0, int(since.timestamp() * 1000))).encode()
            while entries := await self._range(stream, first, end):
                for id_, fields in entries:
                    yield decode_entry(stream, id_, fields)
                first = b"(" + entries[-1][0]
            while follow:
                reply: Any = await self._client.xread({stream: end}, count=_READ_BATCH, block=int(_BLOCK_S * 1000))
                for _, entries in reply or ():
                    for id_, fields in entries:
                        yield decode_entry(stream, id_, fields)
                    end = entries[-1][0]
        except (exceptions.RedisError, OSError) as error:
            raise map_error(error) from error

    async def _range(self, stream: str, first: bytes, end: bytes) -> Any:
        return await self._client.xrange(stream, first, end, count=_READ_BATCH)

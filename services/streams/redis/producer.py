"""Publishes to Redis Streams without being a member of a group."""

from collections.abc import Sequence
from typing import Final, Self

from redis import exceptions
from redis.asyncio import Redis

from services.streams.base import OutgoingMessage
from services.streams.config import StreamConfig
from services.streams.redis.client import encode_entry, open_client, translate_error

_PUBLISH_AT_ONCE: Final = 500


class RedisPublisher:
    """Publishes without being a member. See `Publisher`."""

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

    async def publish(self, records: Sequence[OutgoingMessage]) -> None:
        """In transactions of up to 500 records. When it raises, some of them may have been published."""
        for at in range(0, len(records), _PUBLISH_AT_ONCE):
            pipeline = self._client.pipeline(transaction=True)
            for record in records[at : at + _PUBLISH_AT_ONCE]:
                pipeline.execute_command("XADD", record.stream, "*", *encode_entry(record))
            try:
                await pipeline.execute()
            except (exceptions.RedisError, OSError) as error:
                raise translate_error(error) from error

    async def close(self) -> None:
        """Release the connections."""
        await self._client.aclose(close_connection_pool=True)

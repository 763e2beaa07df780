"""Publishes to Redis Streams without being a member of a group."""

from collections.abc import Sequence
from typing import Final

from redis import exceptions

from services.streams.base import OutgoingMessage
from services.streams.redis.client import RedisConnection, encode_entry, map_error

_PUBLISH_BATCH: Final = 500


class RedisPublisher(RedisConnection):
    """Publishes without being a member. See `Publisher`."""

    async def publish(self, records: Sequence[OutgoingMessage]) -> None:
        """In transactions of up to 500 records. When it raises, some of them may have been published."""
        for at in range(0, len(records), _PUBLISH_BATCH):
            pipeline = self._client.pipeline(transaction=True)
            for record in records[at : at + _PUBLISH_BATCH]:
                pipeline.execute_command("XADD", record.stream, "*", *encode_entry(record))
            try:
                await pipeline.execute()
            except (exceptions.RedisError, OSError) as error:
                raise map_error(error) from error

"""Publishes to Kafka without being a member of a group."""

import asyncio
from collections.abc import Sequence
from typing import Final, Self

import kafka

from services.core.errors import StreamUnavailable
from services.core.settings import Settings
from services.streams.base import OutgoingMessage
from services.streams.kafka.client import Sender, connect, ensure_topics

_PUBLISH_S: Final = 10.0


class KafkaPublisher:
    """Publishes without being a member. See `Publisher`."""

    def __init__(self, sender: Sender) -> None:
        """Use `open`."""
        self._sender = sender

    @classmethod
    async def open(cls, settings: Settings) -> Self:
        """Connect, and create the topics that are missing.

        Raises:
            ConfigurationError: an option is wrong, or a topic is missing and may not be created.
            StreamUnavailable: no broker answered in time.
        """

        def make() -> Sender:
            admin = connect(settings, kafka.KafkaAdminClient)
            try:
                ensure_topics(settings, admin)
            finally:
                admin.close()
            return Sender(settings, delivery_s=_PUBLISH_S)

        return cls(await asyncio.to_thread(make))

    async def publish(self, records: Sequence[OutgoingMessage]) -> None:
        """Acknowledged by all in-sync replicas. When it raises, some of the records may have been published."""
        failed = await self._sender.send(records)
        if failed:
            raise StreamUnavailable(f"Kafka did not take {len(failed)} of {len(records)} messages in time.")

    async def close(self) -> None:
        """Release the connections."""
        await self._sender.close()

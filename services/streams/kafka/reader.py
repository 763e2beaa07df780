"""Reads whole Kafka topics without being a member of a group."""

import asyncio
import concurrent.futures
import time
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any, Final, Self

import kafka
from kafka import errors

from services.core.errors import StreamUnavailable
from services.streams.base import Message
from services.streams.config import StreamConfig
from services.streams.kafka.client import connect, to_message

_POLL_MS: Final = 300
_READ_BATCH: Final = 200
_CLOSE_MS: Final = 2_000
_ANSWER_MS: Final = 10_000
"""After no answer for this long the broker counts as unavailable."""


class KafkaReader:
    """See `Reader`. Each `read` has a consumer and a thread of its own."""

    def __init__(self, config: StreamConfig) -> None:
        """Use `open`, which tries the connection."""
        self._config = config

    @classmethod
    async def open(cls, config: StreamConfig) -> Self:
        """Try the connection.

        Raises:
            ConfigurationError: an option or the credentials are wrong.
            StreamUnavailable: no broker answered in time.
        """
        probe = await asyncio.to_thread(connect, config, kafka.KafkaAdminClient)
        await asyncio.to_thread(probe.close)
        return cls(config)

    async def read(self, stream: str, *, follow: bool, since: datetime | None = None) -> AsyncIterator[Message]:
        """In offset order per partition; partitions that are added later are not read."""
        loop = asyncio.get_running_loop()
        thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="kafka-read")
        reading: _Reading | None = None
        try:
            reading = await loop.run_in_executor(thread, _Reading, self._config, stream, since)
            while follow or reading.unread:
                for message in await loop.run_in_executor(thread, reading.poll_once):
                    yield message
        except (errors.KafkaError, OSError) as error:
            raise StreamUnavailable(f"Kafka does not answer: {error}.") from error
        finally:
            if reading is not None:
                thread.submit(reading.close)
            thread.shutdown(wait=False)

    async def close(self) -> None:
        """Nothing to release: each read releases its own connection."""


class _Reading:
    """One pass over a topic. Every method blocks."""

    def __init__(self, config: StreamConfig, stream: str, since: datetime | None) -> None:
        self._consumer: Any = connect(
            config,
            kafka.KafkaConsumer,
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            allow_auto_create_topics=False,
        )
        self._heard = time.monotonic()
        self._ends: dict[Any, int] = {}
        """The end offset at the start of the read, of each partition that is not read up to it."""
        try:
            self._begin(stream, since)
        except BaseException:
            self._consumer.close(timeout_ms=_CLOSE_MS)
            raise

    def _begin(self, stream: str, since: datetime | None) -> None:
        partitions = [kafka.TopicPartition(stream, each) for each in self._consumer.partitions_for_topic(stream)]
        if not partitions:
            return
        self._consumer.assign(partitions)
        first = self._consumer.beginning_offsets(partitions, timeout_ms=_ANSWER_MS)
        end = self._consumer.end_offsets(partitions, timeout_ms=_ANSWER_MS)
        if since is not None:
            since_ms = max(0, int(since.timestamp() * 1000))
            found = self._consumer.offsets_for_times(dict.fromkeys(partitions, since_ms), timeout_ms=_ANSWER_MS)
            first |= {each: found[each].offset if found.get(each) else end[each] for each in partitions}
        for partition in partitions:
            self._consumer.seek(partition, first[partition])
        self._ends = {each: end[each] for each in partitions if first[each] < end[each]}

    @property
    def unread(self) -> bool:
        """Whether messages that existed at the start of the read are left."""
        return bool(self._ends)

    def poll_once(self) -> list[Message]:
        """The messages of one short poll.

        Raises:
            KafkaError: the poll returned nothing, and the broker does not answer.
        """
        assigned = self._consumer.assignment()
        if not assigned:
            time.sleep(_POLL_MS / 1000)  # no such topic yet
            return []
        polled = self._consumer.poll(timeout_ms=_POLL_MS, max_records=_READ_BATCH)
        self._ends = {
            each: end for each, end in self._ends.items() if (self._consumer.position(each, timeout_ms=0) or 0) < end
        }
        if polled:
            self._heard = time.monotonic()
        elif time.monotonic() - self._heard > _ANSWER_MS / 1000:
            self._consumer.end_offsets(list(assigned), timeout_ms=_ANSWER_MS)
            self._heard = time.monotonic()
        return [to_message(record) for records in polled.values() for record in records]

    def close(self) -> None:
        """Disconnect."""
        self._consumer.close(timeout_ms=_CLOSE_MS)

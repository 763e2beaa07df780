"""The backlog of a consumer group on Kafka, read without being a member of it and without blocking the loop."""

import asyncio
import concurrent.futures
from typing import Any, Final

import kafka
from kafka import errors
from kafka.admin import OffsetSpec

from services.core.errors import StreamUnavailable
from services.streams.base import Lag
from services.streams.config import StreamConfig
from services.streams.kafka.client import connect

_TIMEOUT_S: Final = 10.0


class LagMeter:
    """End offsets minus committed offsets, through an admin client in a thread of its own."""

    def __init__(self, config: StreamConfig, admin: Any) -> None:
        """Takes over `admin`."""
        self._config = config
        self._admin: Any = admin
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="kafka-lag")
        self._running: asyncio.Future[Lag] | None = None

    async def read(self) -> Lag:
        """Read the backlog. Concurrent callers share one reading.

        Raises:
            StreamUnavailable: no broker answered within 10 s.
        """
        if self._running is None or self._running.done():
            self._running = asyncio.get_running_loop().run_in_executor(self._thread, self._measure)
        try:
            return await asyncio.wait_for(asyncio.shield(self._running), _TIMEOUT_S)
        except (errors.KafkaError, OSError, TimeoutError) as error:
            raise StreamUnavailable(f"Reading the backlog from Kafka failed: {error or 'no answer'}.") from error

    async def close(self) -> None:
        """Release the connection."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._disconnect)
        self._thread.shutdown(wait=False)

    def _measure(self) -> Lag:
        if self._admin is None:
            self._admin = connect(self._config, kafka.KafkaAdminClient)
        try:
            return self._read_offsets()
        except BaseException:
            self._disconnect()  # its cached metadata may be stale; the next reading connects again
            raise

    def _read_offsets(self) -> Lag:
        topic = self._config.submissions_stream
        described = self._admin.describe_topics([topic])
        partitions = [
            kafka.TopicPartition(topic, partition["partition_index"])
            for each in described
            for partition in each["partitions"]
        ]
        committed = self._admin.list_group_offsets({self._config.group: partitions})[self._config.group]
        # A group that has committed nothing begins at the oldest message.
        fresh = [each for each in partitions if each not in committed or committed[each].offset < 0]
        first = self._offsets(fresh, OffsetSpec.EARLIEST)
        end = self._offsets(partitions, OffsetSpec.LATEST)
        waiting = {
            each.partition: max(0, end[each] - (first[each] if each in first else committed[each].offset))
            for each in partitions
        }
        return Lag(waiting, published=sum(end.values()), partitions=len(partitions))

    def _offsets(self, partitions: list[Any], spec: Any) -> dict[Any, int]:
        if not partitions:
            return {}
        found = self._admin.list_partition_offsets(
            dict.fromkeys(partitions, spec), isolation_level="read_committed", timeout_ms=int(_TIMEOUT_S * 1000)
        )
        return {partition: offset.offset for partition, offset in found.items()}

    def _disconnect(self) -> None:
        if self._admin is not None:
            self._admin.close()
            self._admin = None

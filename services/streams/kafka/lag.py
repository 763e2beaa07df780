"""The backlog of a consumer group on Kafka, and its partitions without an owner.

Both are read without being a member of the group and without blocking the loop.
"""

import asyncio
import concurrent.futures
from collections.abc import Callable
from typing import Any, Final, TypeVar

import kafka
from kafka import errors
from kafka.admin import OffsetSpec

from services.core.errors import StreamUnavailable
from services.streams.base import Lag
from services.streams.config import StreamConfig
from services.streams.kafka.client import connect

_TIMEOUT_S: Final = 10.0
T = TypeVar("T")


class LagMeter:
    """End offsets minus committed offsets, through an admin client in a thread of its own."""

    def __init__(self, config: StreamConfig, admin: Any) -> None:
        """Takes over `admin`."""
        self._config = config
        self._admin: Any = admin
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="kafka-lag")
        self._running: asyncio.Future[Lag] | None = None
        self._searching: asyncio.Future[frozenset[int]] | None = None

    async def read(self) -> Lag:
        """Read the backlog. Concurrent callers share one reading.

        Raises:
            StreamUnavailable: no broker answered within 10 s.
        """
        if self._running is None or self._running.done():
            self._running = self._start(self._read_offsets)
        return await _answer(self._running, "Reading the backlog from Kafka failed")

    async def find_unowned_partitions(self) -> frozenset[int]:
        """The partitions of the submissions that no member owns. Empty during a rebalance.

        Raises:
            StreamUnavailable: no broker answered within 10 s.
        """
        if self._searching is None or self._searching.done():
            self._searching = self._start(self._read_unowned)
        return await _answer(self._searching, "Reading the owners of the partitions from Kafka failed")

    async def close(self) -> None:
        """Release the connection."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._disconnect)
        self._thread.shutdown(wait=False)

    def _start(self, read: Callable[[], T]) -> "asyncio.Future[T]":
        def connect_and_read() -> T:
            if self._admin is None:
                self._admin = connect(self._config, kafka.KafkaAdminClient)
            try:
                return read()
            except BaseException:
                self._disconnect()  # its cached metadata may be stale; the next reading connects again
                raise

        return asyncio.get_running_loop().run_in_executor(self._thread, connect_and_read)

    def _read_partitions(self) -> list[Any]:
        topic = self._config.submissions_stream
        described = self._admin.describe_topics([topic])
        return [
            kafka.TopicPartition(topic, partition["partition_index"])
            for each in described
            for partition in each["partitions"]
        ]

    def _read_unowned(self) -> frozenset[int]:
        group = self._admin.describe_groups([self._config.group])[self._config.group]
        if group["error"] or group["group_state"] != "Stable":
            return frozenset()
        owned = {
            partition
            for member in group["members"]
            for assigned in (member["member_assignment"] or {}).get("assigned_partitions", ())
            if assigned["topic"] == self._config.submissions_stream
            for partition in assigned["partitions"]
        }
        return frozenset(each.partition for each in self._read_partitions()) - owned

    def _read_offsets(self) -> Lag:
        partitions = self._read_partitions()
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


async def _answer(reading: "asyncio.Future[T]", failed: str) -> T:
    """Wait up to 10 s for a reading, which goes on afterwards."""
    try:
        return await asyncio.wait_for(asyncio.shield(reading), _TIMEOUT_S)
    except (errors.KafkaError, OSError, TimeoutError) as error:
        raise StreamUnavailable(f"{failed}: {error or 'no answer'}.") from error

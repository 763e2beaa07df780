"""The streams from outside: Kafka's own client, past every proxy, and nothing of Sluice but its messages."""

import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Final

import kafka
from kafka.errors import KafkaError

from services.streams.base import Message
from tests.faults.submissions import Submitted

_DELIVERY_MS: Final = 600_000
"""The producer never gives up, so that each message goes in once whatever the broker does."""
_ANSWER_MS: Final = 10_000
_SOON_MS: Final = 3_000
_OPEN_S: Final = 60.0
"""Longer than a transaction may stay open."""


class Producer:
    """Publishes submissions, each once. Its methods block."""

    def __init__(self, address: str, stream: str) -> None:
        self._stream = stream
        self._producer: Any = kafka.KafkaProducer(
            bootstrap_servers=address,
            acks="all",
            enable_idempotence=True,
            max_block_ms=_DELIVERY_MS,
            delivery_timeout_ms=_DELIVERY_MS,
            request_timeout_ms=20_000,
            reconnect_backoff_max_ms=1_000,
        )

    def publish(self, messages: Iterable[Submitted]) -> None:
        """Return when all of them are durable."""
        pending = [self._producer.send(self._stream, each.value, key=each.key) for each in messages]
        for each in pending:
            each.get(_DELIVERY_MS / 1000)

    def close(self) -> None:
        self._producer.close(timeout=2)


class Backlog:
    """What the group has not committed yet, read without being a member of it. Its methods block, not for long."""

    def __init__(self, address: str, stream: str, group: str) -> None:
        self._arguments = {
            "bootstrap_servers": address,
            "bootstrap_timeout_ms": _SOON_MS,
            "group_id": group,
            "enable_auto_commit": False,
        }
        self._stream = stream
        self._partitions: list[Any] = []
        self._consumer: Any = None

    def read(self) -> int | None:
        """How many messages; None where the broker does not say."""
        try:
            if self._consumer is None:
                self._consumer = kafka.KafkaConsumer(**self._arguments)
            if not self._partitions:
                found = self._consumer.partitions_for_topic(self._stream) or ()
                self._partitions = [kafka.TopicPartition(self._stream, each) for each in found]
            ends = self._consumer.end_offsets(self._partitions, timeout_ms=_SOON_MS)
            done = [self._consumer.committed(each, timeout_ms=_SOON_MS) or 0 for each in self._partitions]
            return int(sum(ends.values()) - sum(done))
        except (KafkaError, OSError):
            self.close()
            return None

    def close(self) -> None:
        if self._consumer is not None:
            self._consumer.close(autocommit=False, timeout_ms=1_000)
            self._consumer = None


def read_all(address: str, stream: str) -> list[Message]:
    """A whole stream, committed transactions only, each partition in its order. Blocks.

    Waits for transactions that whoever began them has left open: the broker ends them in the end.

    Raises:
        TimeoutError: it does not.
    """
    consumer: Any = kafka.KafkaConsumer(
        bootstrap_servers=address, group_id=None, enable_auto_commit=False, isolation_level="read_committed"
    )
    try:
        partitions = [kafka.TopicPartition(stream, each) for each in sorted(consumer.partitions_for_topic(stream))]
        ends = _ends(address, partitions)
        consumer.assign(partitions)
        consumer.seek_to_beginning(*partitions)
        found: list[Message] = []
        heard = time.monotonic()
        while any((consumer.position(each, timeout_ms=_ANSWER_MS) or 0) < end for each, end in ends.items()):
            polled = consumer.poll(timeout_ms=500, max_records=1000)
            found += [_message(record) for records in polled.values() for record in records]
            heard = time.monotonic() if polled else heard
            if time.monotonic() - heard > _OPEN_S:
                raise TimeoutError(f"{stream} cannot be read to its end")
        return found
    finally:
        consumer.close(timeout_ms=1_000)


def _ends(address: str, partitions: list[Any]) -> dict[Any, int]:
    """Where the partitions end, transactions that are open included."""
    consumer: Any = kafka.KafkaConsumer(bootstrap_servers=address, group_id=None, enable_auto_commit=False)
    try:
        ends: dict[Any, int] = consumer.end_offsets(partitions, timeout_ms=_ANSWER_MS)
        return ends
    finally:
        consumer.close(timeout_ms=1_000)


def _message(record: Any) -> Message:
    return Message(
        value=record.value or b"",
        key=record.key,
        headers=tuple((name, value or b"") for name, value in record.headers),
        source=f"{record.topic}/{record.partition}/{record.offset}",
        timestamp=datetime.fromtimestamp(record.timestamp / 1000, UTC),
    )

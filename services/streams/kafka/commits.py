"""Every commit of offsets to Kafka, and the reading of what is committed.

`offset_tracker` finds the offset of a partition that may be committed (the next one to read). The callers say when:

- At least once: `consumer` commits every 0.5 s and when it leaves the group, `rebalance` when partitions are revoked.
- Exactly once: `exactly_once` collects offsets and outputs, and `transactions` commits both in one transaction.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from kafka import errors
from kafka.structs import OffsetAndMetadata

from services.streams.kafka import compat

log = logging.getLogger(__name__)


def commit_in_background(consumer: Any, offsets: Mapping[Any, int], on_end: Callable[[Exception | None], None]) -> None:
    """Begin to commit the offsets by partition. A later poll calls `on_end` with the error, or None."""

    def end(_: Any, outcome: Any) -> None:
        on_end(outcome if isinstance(outcome, Exception) else None)

    consumer.commit_async(_with_metadata(offsets), callback=end)


async def commit_on_revocation(consumer: Any, offsets: Mapping[Any, int]) -> None:
    """Commit before the partitions go to other members. Runs on kafka-python's own thread. A failure is logged."""
    try:
        await consumer.commit_async(_with_metadata(offsets))
    except errors.KafkaError as error:
        log.warning("committing on revocation failed; some messages will be judged again: %s", error)


def commit_before_leaving(consumer: Any, offsets: Mapping[Any, int], timeout_ms: int) -> None:
    """Commit before the member leaves its group. Blocks. A failure is logged."""
    try:
        consumer.commit(_with_metadata(offsets), timeout_ms=timeout_ms)
    except Exception as error:  # noqa: BLE001 - kafka-python raises more than its own errors
        log.warning("the last commit failed; some messages will be judged again: %s", error)


def add_offsets_to_transaction(producer: Any, offsets: Mapping[Any, int], group_metadata: Any) -> Any:
    """Begin to send the offsets to the open transaction, which commits them with its records. Returns the result."""
    return compat.begin_send_offsets(producer, _with_metadata(offsets), group_metadata)


def begin_transaction_commit(producer: Any) -> Any:
    """Begin to commit the records and the offsets of the open transaction. Returns the result to wait for."""
    return compat.begin_commit(producer)


def fetch_committed(consumer: Any, partition: Any, timeout_ms: int) -> int | None:
    """The group's committed offset, None if there is none. Blocks until every transaction that could move it has ended.

    Raises:
        KafkaError: the broker does not answer.
    """
    compat.forget_offset_fetches(consumer, [partition])
    offset: int | None = consumer.committed(partition, timeout_ms=timeout_ms)
    return offset


def _with_metadata(offsets: Mapping[Any, int]) -> dict[Any, Any]:
    return {partition: OffsetAndMetadata(offset, "", -1) for partition, offset in offsets.items()}

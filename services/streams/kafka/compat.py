"""Every work-around for kafka-python 3.0.12, with the defect that it is for. No other module uses private attributes.

`tests/streams/test_kafka_compat.py` shows each defect on kafka-python alone. When a release fixes one, its test fails:
then the work-around can go.

Four more defects need no private attribute. Their tests are in the same file:

- One record that the broker rejects fails every batch of an idempotent producer, and the producer fails every later
  record. `producer.AtLeastOnceSender` replaces the producer and sends each failed record alone.
- `KafkaProducer.send` accepts records without a limit while no broker takes them. `producer.AtLeastOnceSender` limits
  its calls.
- A record that was not delivered in time does not fail its transaction: the commit succeeds without the record.
  `transactions.TransactionalSender` waits for every record before it sends offsets.
- The offsets of an aborted transaction are sent again with the next one. `transactions.TransactionalSender` then
  replaces the producer.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

from kafka import errors
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.record.default_records import DefaultRecord, DefaultRecordBatch
from kafka.record.util import decode_varint
from kafka.structs import MemberState

log = logging.getLogger(__name__)

# ---- Reading: a header name that is not UTF-8 stops the consumer.
#
# Brokers accept any bytes as the name of a header. kafka-python raises in the middle of the batch, and `poll` never
# returns a record again. So one such record would stop every member that receives it. Such a record is parsed once
# more here, and bytes that are not UTF-8 become `\\xNN`.

strict_read_msg: Any = DefaultRecordBatch._read_msg
"""kafka-python's own parser, which raises UnicodeDecodeError."""


def _read_msg(batch: Any) -> Any:
    try:
        return strict_read_msg(batch)
    except UnicodeDecodeError:
        return _read_leniently(batch)


def _read_leniently(batch: Any) -> Any:
    """One record in message format 2, see https://kafka.apache.org/documentation/#record."""
    buffer = batch._buffer
    length, position = decode_varint(buffer, batch._pos)
    end = position + length
    position += 1  # attributes
    delta, position = decode_varint(buffer, position)
    offset, position = decode_varint(buffer, position)

    def read_bytes() -> bytes | None:
        nonlocal position
        size, position = decode_varint(buffer, position)
        if size < 0:
            return None
        position += size
        return bytes(buffer[position - size : position])

    key, value = read_bytes(), read_bytes()
    count, position = decode_varint(buffer, position)
    headers = [((read_bytes() or b"").decode(errors="backslashreplace"), read_bytes()) for _ in range(count)]
    batch._pos = end
    appended = batch.timestamp_type == batch.LOG_APPEND_TIME
    timestamp = batch.max_timestamp if appended else batch.first_timestamp + delta
    return DefaultRecord(length, batch.base_offset + offset, timestamp, batch.timestamp_type, key, value, headers)


def patch_header_decoding() -> None:
    """Parse header names that are not UTF-8, from now on, in this process. A second call does nothing."""
    DefaultRecordBatch._read_msg = _read_msg


# ---- Polling


def restore_paused_records(consumer: Any) -> None:
    """Let the consumer return the records of a partition that was paused and resumed. Call it before each poll.

    The defect: the fetcher sets the records of a paused partition aside. It restores them only while it has no current
    records, which it tests with `is None`. But an exhausted record set stays there; it is falsy, not None. So the
    records that were set aside are never returned.
    """
    if not consumer._fetcher._next_partition_records:
        consumer._fetcher._next_partition_records = None


def request_missed_rejoin(consumer: Any) -> None:
    """Continue a rejoin that a poll has left unfinished. Call it before each poll; a second request does no harm.

    The defect: when the consumer rejoins because the partitions changed, and the poll ends in the middle of that, the
    rejoin is forgotten. The member then sends no heartbeats and cannot commit.
    """
    if consumer.group_metadata().state == MemberState.REBALANCING:
        consumer._coordinator.request_rejoin()


def raise_if_fenced(consumer: Any) -> None:
    """Report that another member has joined with this one's `group_instance_id`. Call it before each poll.

    The defect: the broker reports the fencing in its response to a heartbeat. The consumer logs that, stops its
    heartbeats, and `poll` goes on as if nothing had happened. A stable member that needs no rejoin has its heartbeats
    on, so their absence means the fencing.

    Raises:
        FencedInstanceIdError: another member has this one's identity.
    """
    coordinator = consumer._coordinator
    if coordinator.stable() and not coordinator._heartbeat_enabled and not coordinator.need_rejoin():
        raise errors.FencedInstanceIdError("the heartbeat was refused")


# ---- Offsets


def forget_offset_fetches(consumer: Any, partitions: Collection[Any] | None = None) -> None:
    """Let the next request for committed offsets (of exactly `partitions`, or of any) go to the broker.

    The defect: a request that timed out is kept. The next request for the same partitions, at any later time, gets its
    answer: the offsets of an earlier assignment.
    """
    futures = consumer._coordinator._offset_fetch_futures
    if partitions is None:
        futures.clear()
    else:
        futures.pop(frozenset(partitions), None)


# ---- Rebalancing


class FixedCooperativeStickyAssignor(CooperativeStickyAssignor):  # type: ignore[misc]
    """Claims only the partitions that this member owns when it joins.

    The defect: a member that has lost its membership still claims its old partitions. The leader then assigns them to
    two members in the same generation. When the membership is lost while the member is joining, kafka-python also does
    not call the rebalance listener, so the member keeps the partitions; `on_lost` is called instead.
    """

    consumer: Any
    on_lost: Callable[[Collection[Any]], Any]
    _requests = 0

    def request_rebalance(self) -> None:
        """Let the member join again at its next poll, and the whole group rebalance. Any thread may call it.

        The broker answers a member that joins as before with its present assignment. Only the leader, or a member whose
        metadata has changed, makes the group rebalance. The number of requests changes the metadata; the leader ignores
        it.
        """
        self._requests += 1
        self.consumer._coordinator.request_rejoin()

    def metadata(self, topics: Any) -> Any:
        """The subscription in a request to join. Runs on kafka-python's own thread."""
        if self.consumer._coordinator._generation.is_lost():
            self.member_assignment = None
            lost = self.consumer.assignment()
            if lost:
                log.warning(
                    "partitions lost while joining, without a commit: %s; other members judge their messages again",
                    sorted(lost),
                )
                self.consumer._subscription.assign_from_subscribed([])
                self.on_lost(lost)
        subscription = super().metadata(topics)
        subscription.user_data = str(self._requests).encode() if self._requests else b""
        return subscription


async def sleep_on_kafka_thread(consumer: Any, seconds: float) -> None:
    """Wait in a rebalance listener while the heartbeats go on.

    The defect: the listener is a coroutine of kafka-python's own event loop, which has no public way to wait.
    """
    await consumer._net.sleep(seconds)


# ---- Transactions
#
# The defect: the public methods wait for the broker without a limit. These begin the same requests and return the
# result to wait for.


def begin_abort(producer: Any) -> Any:
    """As `abort_transaction`, without the wait."""
    return _sent(producer, producer._transaction_manager.begin_abort())


def begin_commit(producer: Any) -> Any:
    """As `commit_transaction`, without the wait."""
    return _sent(producer, producer._transaction_manager.begin_commit())


def begin_send_offsets(producer: Any, offsets: Mapping[Any, Any], group_metadata: Any) -> Any:
    """As `send_offsets_to_transaction`, without the wait."""
    return _sent(producer, producer._transaction_manager.send_offsets_to_transaction(offsets, group_metadata))


def _sent(producer: Any, result: Any) -> Any:
    producer._sender.wakeup()
    return result


# ---- Closing


def end_sender(producer: Any) -> None:
    """End the thread of a producer that `close` left running. Its undelivered records fail.

    The defect: when `close` cannot deliver every record in time, it raises before it ends the thread.
    """
    producer._sender.force_close()

"""The transport on Apache Kafka: one kafka-python consumer in a thread of its own, one producer.

The thread polls whatever the event loop does, so an assessment may take as long as it likes: the membership does not
depend on it. What is received waits in a bounded buffer; when that is full, or when one partition's window is, the
partitions are paused. Offsets are committed as far as the ledgers allow, every `_COMMIT_S`, on revocation and on close.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import kafka
from kafka import AsyncConsumerRebalanceListener, errors
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.structs import MemberState, OffsetAndMetadata

from services.errors import NotOwned, StreamUnavailable
from services.settings import Settings
from services.streams.kafka_clients import Sender, as_message, backoff, connect, ensure_topics
from services.streams.kafka_lag import LagMeter
from services.streams.ledger import Finish, Ledger
from services.streams.transport import Lag, Message, Record

log = logging.getLogger(__name__)

_COMMIT_S: Final = 0.5
_UNANSWERED_S: Final = 35.0
"""A commit without an answer, longer than any request may take."""
_POLL_MS: Final = 200
_WINDOW: Final = 4096
"""Offsets per partition between the oldest unfinished one and the newest received one."""
_REBUILD_S: Final = 30.0
"""A consumer that has failed at everything for this long is replaced."""
_LEAVE_MS: Final = 3_000
_DELIVERY_S: Final = 30.0
_PUBLISH_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class _Place:
    """A message's token: its offset, and the ledger of the assignment under which it was received."""

    ledger: Ledger
    offset: int


class KafkaTransport:
    """One member of a consumer group. See `Transport` for what the methods promise."""

    def __init__(
        self, settings: Settings, member: str, sender: Sender, joined: tuple[Any, "_Rebalance"], meter: LagMeter
    ) -> None:
        """Use `open`, which makes the parts."""
        self._settings = settings
        self._member = member
        self._sender = sender
        self._consumer, listener = joined
        listener.transport = self
        self._meter = meter
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        """Guards the ledgers and the buffer, which the poll thread, kafka-python's own thread and the loop all use."""
        self._ledgers: dict[Any, Ledger] = {}
        self._buffer: deque[Message] = deque()
        self._arrived = asyncio.Event()
        self._paused = False
        self._closed = False
        self._closing = threading.Event()
        self._next_commit = 0.0
        self._suspect = False
        """The last poll failed: the consumer may stand behind records that it never returned."""
        self._thread = threading.Thread(target=self._run, name=f"kafka-{member}", daemon=True)
        self._thread.start()

    @classmethod
    async def open(cls, settings: Settings, member: str) -> Self:
        """Create the topics that are missing and join the group.

        Raises:
            ConfigurationError: an option is wrong, or a topic is missing and may not be created.
            StreamUnavailable: no broker answered in time.
        """

        def make() -> tuple[Sender, tuple[Any, _Rebalance], LagMeter]:
            admin = connect(settings, kafka.KafkaAdminClient, client_id=f"{member}-admin")
            try:
                ensure_topics(settings, admin)
                sender = Sender(settings, delivery_s=_DELIVERY_S)
                joined = _subscribe(settings, member)
            except BaseException:
                admin.close()
                raise
            return sender, joined, LagMeter(settings, admin)

        sender, joined, meter = await asyncio.to_thread(make)
        return cls(settings, member, sender, joined, meter)

    async def receive(self, limit: int, timeout_s: float) -> Sequence[Message]:
        """In offset order per partition."""
        deadline = self._loop.time() + timeout_s
        while True:
            self._arrived.clear()
            if not self._paused:
                with self._lock:
                    batch = [self._buffer.popleft() for _ in range(min(limit, len(self._buffer)))]
                if batch:
                    return batch
            remaining = deadline - self._loop.time()
            if remaining <= 0:
                return []
            try:
                await asyncio.wait_for(self._arrived.wait(), remaining)
            except TimeoutError:
                return []

    async def settle(self, message: Message, records: Sequence[Record]) -> None:
        """At least once: the records are acknowledged by all in-sync replicas, then the offset is committed."""
        place: _Place = message.token
        pending = list(records)
        for delay in backoff():
            if not place.ledger.holds(place.offset):
                raise NotOwned(f"{message.source} belongs to another member by now.")
            pending = await self._sender.send(pending)
            if not pending:
                break
            await asyncio.sleep(delay)
        with self._lock:
            outcome = place.ledger.finish(place.offset)
        if outcome in (Finish.REVOKED, Finish.NOT_HELD):
            raise NotOwned(f"{message.source} went to another member while it was being published.")

    async def lag(self) -> Lag:
        """End offset minus committed offset, for every partition of the submissions."""
        return await self._meter.read()

    def pause(self) -> None:
        """The buffer fills up, then the partitions are paused."""
        self._paused = True

    def resume(self) -> None:
        """The inverse of `pause`."""
        self._paused = False
        self._arrived.set()

    async def close(self) -> None:
        """Commit what is done and leave the group, so that the other members get the rest at once.

        Gives up after about 10 s when the broker is away.
        """
        if self._closed:
            return
        self._closed = True
        await self._sender.close()  # what is being settled is done before the last commit
        self._closing.set()
        await asyncio.to_thread(self._thread.join)
        await self._meter.close()

    # ---- the poll thread

    def _run(self) -> None:
        delays = backoff()
        failing_since: float | None = None
        while not self._closing.is_set():
            try:
                if self._suspect:
                    self._rewind()
                    self._suspect = False
                self._turn()
                if failing_since is not None:
                    delays, failing_since = backoff(), None
            except Exception as error:  # noqa: BLE001 - the membership must not end with one bad poll
                log.warning("polling Kafka failed: %s: %s", type(error).__name__, error)
                self._suspect = True
                failing_since = failing_since or time.monotonic()
                if time.monotonic() - failing_since > _REBUILD_S:
                    self._rebuild()
                    failing_since = time.monotonic()
                self._closing.wait(next(delays))
        self._leave()

    def _turn(self) -> None:
        assigned = self._consumer.assignment()
        with self._lock:
            for partition in assigned:
                if partition not in self._ledgers:
                    self._ledgers[partition] = self._new_ledger()
            room = self._settings.in_flight - len(self._buffer)
            # One poll may bring everything from one partition, so each that is polled has room for a whole one.
            full = {each for each in assigned if room < 1 or self._ledgers[each].room < self._settings.in_flight}
        paused = self._consumer.paused()
        self._consumer.pause(*(full - paused))
        self._consumer.resume(*(paused & assigned - full))
        if self._consumer.group_metadata().state == MemberState.REBALANCING:
            # kafka-python 3.0.12 forgets a rejoin of its own (the partitions changed) when a poll ends in the middle
            # of it: no heartbeats, no commits any more. Asking again for the same rejoin does no harm.
            self._consumer._coordinator.request_rejoin()
        polled = self._consumer.poll(timeout_ms=_POLL_MS // 10 if full else _POLL_MS, max_records=max(1, room))
        if polled:
            with self._lock:
                for partition, records in polled.items():
                    for record in records:
                        self._buffer.append(self._take(partition, record))
            self._wake()
        if time.monotonic() >= self._next_commit:
            offsets = self._committable()
            # One at a time: the callback, which a later poll calls, brings the next one forward.
            self._next_commit = time.monotonic() + (_UNANSWERED_S if offsets else _COMMIT_S)
            if offsets:
                self._consumer.commit_async(offsets, callback=self._committed)

    def _take(self, partition: Any, record: Any) -> Message:
        ledger = self._ledgers.get(partition)
        if ledger is None:  # assigned during this very poll
            ledger = self._ledgers[partition] = self._new_ledger()
        if ledger.position is not None and record.offset < ledger.position:
            # The log was cut (an unclean election, or a topic made anew): these are other messages than before.
            log.warning("%s went back from offset %d to %d", partition, ledger.position, record.offset)
            self._drop(partition)
            ledger = self._ledgers[partition] = self._new_ledger()
        ledger.receive(record.offset)
        return as_message(record, _Place(ledger, record.offset))

    def _new_ledger(self) -> Ledger:
        return Ledger(max(_WINDOW, 4 * self._settings.in_flight))

    def _rewind(self) -> None:
        """After a poll that failed: what it may have consumed without returning it is fetched again."""
        with self._lock:
            positions = {partition: ledger.position for partition, ledger in self._ledgers.items()}
        for partition in self._consumer.assignment():
            position = positions.get(partition)
            if position is None:
                position = self._consumer.committed(partition, timeout_ms=_LEAVE_MS)
            if position is None:
                self._consumer.seek_to_beginning(partition)
            else:
                self._consumer.seek(partition, position)

    def _committable(self) -> dict[Any, Any]:
        positions = {}
        for partition in self._consumer.assignment():
            ledger = self._ledgers.get(partition)
            if ledger is not None and not ledger.held and not self._suspect:
                # Offsets that hold no message (a transaction's markers) are passed over, or lag never gets to zero.
                with contextlib.suppress(errors.KafkaError):  # not known yet
                    positions[partition] = self._consumer.position(partition, timeout_ms=0)
        with self._lock:
            for partition, position in positions.items():
                if position is not None and partition in self._ledgers:
                    self._ledgers[partition].pass_over(position)
            return _as_offsets(self._ledgers)

    def _committed(self, offsets: dict[Any, Any], outcome: Any) -> None:
        self._next_commit = time.monotonic() + _COMMIT_S
        if isinstance(outcome, Exception):
            log.info("a commit failed, the next one makes up for it: %s", outcome)
            return
        with self._lock:
            for partition, offset in offsets.items():
                if partition in self._ledgers:
                    self._ledgers[partition].commit(offset.offset)

    def _drop(self, partition: Any) -> None:
        """Give up what is held of a partition. The caller holds the lock."""
        ledger = self._ledgers.pop(partition, None)
        if ledger is not None:
            ledger.revoke()
            self._buffer = deque(each for each in self._buffer if each.token.ledger is not ledger)

    def give_up(self, partitions: Iterable[Any]) -> dict[Any, Any]:
        """Drop what is held of `partitions` (for the rebalance listener). Returns the offsets to commit for them."""
        with self._lock:
            offsets = _as_offsets({each: self._ledgers[each] for each in partitions if each in self._ledgers})
            for partition in partitions:
                self._drop(partition)
        return offsets

    def _rebuild(self) -> None:
        self.give_up(tuple(self._ledgers))
        try:
            consumer, listener = _subscribe(self._settings, self._member)
            listener.transport = self
            self._consumer, old = consumer, self._consumer
            self._next_commit = 0.0
            old.close(autocommit=False, timeout_ms=_LEAVE_MS)
        except Exception as error:  # noqa: BLE001 - kafka-python raises more than its own errors
            log.warning("replacing the Kafka consumer failed: %s", error)

    def _leave(self) -> None:
        try:
            self._consumer.commit(self._committable(), timeout_ms=_LEAVE_MS)
        except Exception as error:  # noqa: BLE001 - kafka-python raises more than its own errors
            log.warning("the last commit failed, so some messages will be judged again: %s", error)
        self.give_up(tuple(self._ledgers))
        try:
            self._consumer.close(autocommit=False, timeout_ms=_LEAVE_MS)
        except Exception as error:  # noqa: BLE001 - kafka-python raises more than its own errors
            log.warning("leaving the group failed: %s", error)

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._arrived.set)
        except RuntimeError:  # the loop is gone; so is whoever waited
            self._closing.set()


class _Rebalance(AsyncConsumerRebalanceListener):  # type: ignore[misc]
    """Runs on kafka-python's own thread while the poll thread waits inside `poll`."""

    transport: KafkaTransport
    """Set before the first poll, which is when partitions can be assigned for the first time."""

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer

    async def on_partitions_assigned(self, assigned: set[Any]) -> None:
        log.info("assigned: %s", sorted(assigned))

    async def on_partitions_revoked(self, revoked: set[Any]) -> None:
        """The next owner starts after this returned, so what is done is committed first."""
        offsets = self.transport.give_up(revoked)
        if offsets:
            try:
                await self._consumer.commit_async(offsets)
            except errors.KafkaError as error:
                log.warning("could not commit on revocation, some messages will be judged again: %s", error)

    async def on_partitions_lost(self, lost: set[Any]) -> None:
        """This member was thrown out: it has nothing to commit any more."""
        log.warning("lost: %s", sorted(lost))
        self.transport.give_up(lost)


def _as_offsets(ledgers: Mapping[Any, Ledger]) -> dict[Any, Any]:
    return {
        partition: OffsetAndMetadata(ledger.committable, "", -1)
        for partition, ledger in ledgers.items()
        if ledger.committable is not None
    }


def _subscribe(settings: Settings, member: str) -> tuple[Any, _Rebalance]:
    consumer = connect(
        settings,
        kafka.KafkaConsumer,
        client_id=member,
        group_id=settings.group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        partition_assignment_strategy=[CooperativeStickyAssignor],
    )
    listener = _Rebalance(consumer)
    consumer.subscribe([settings.submissions_stream], listener=listener)
    # A member that joins before it knows the partitions makes the group rebalance twice.
    consumer.partitions_for_topic(settings.submissions_stream)
    return consumer, listener


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

    async def publish(self, records: Sequence[Record]) -> None:
        """Acknowledged by all in-sync replicas. When it raises, some of the records may have been published."""
        failed = await self._sender.send(records)
        if failed:
            raise StreamUnavailable(f"Kafka did not take {len(failed)} of {len(records)} messages in time.")

    async def close(self) -> None:
        """Release the connections."""
        await self._sender.close()

"""The transport on Apache Kafka: one kafka-python consumer in a thread of its own, one producer.

The thread polls whatever the event loop does, so an assessment may take as long as it likes: the membership does not
depend on it. What is received waits in a bounded buffer; when that is full, or when one partition's window is, the
partitions are paused. At least once: offsets are committed as far as the ledgers allow, every `_COMMIT_S`, on
revocation and on close. Exactly once: they are committed with the outputs, by `Releases`.
"""

import asyncio
import contextlib
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Self

import kafka
from kafka import errors
from kafka.structs import OffsetAndMetadata

from services.core.errors import ConfigurationError, NotOwned
from services.core.settings import Settings
from services.streams.base import Lag, Message, Record
from services.streams.kafka import rebalance as kafka_consumer
from services.streams.kafka.client import Sender, as_message, backoff, connect, ensure_topics
from services.streams.kafka.exactly_once import Place, Releases
from services.streams.kafka.lag import LagMeter
from services.streams.kafka.offsets import Finish, Ledger
from services.streams.kafka.rebalance import Rebalance, subscribe
from services.streams.kafka.transactions import Transactions

log = logging.getLogger(__name__)

_COMMIT_S: Final = 0.5
_UNANSWERED_S: Final = 35.0
"""A commit without an answer, longer than any request may take."""
_POLL_MS: Final = 200
_WINDOW: Final = 4096
"""Offsets per partition between the oldest unfinished one and the newest received one."""
_WINDOW_SHARES: Final = 16
"""Or this many times `in_flight`, if that is more: a partition is paused with a share or less to go, nearly full."""
_REBUILD_S: Final = 30.0
"""A consumer that has failed at everything for this long is replaced."""
_FENCINGS: Final = 4
_FENCINGS_S: Final = 60.0
"""A member that is fenced joins again: a broker that restarts may know an earlier life of it. As many fencings in this
time are another member's doing."""
_LEAVE_MS: Final = 3_000
_DELIVERY_S: Final = 30.0
_FLUSH_S: Final = 3.0


class KafkaTransport:
    """One member of a consumer group. See `Transport` for what the methods promise."""

    def __init__(
        self,
        settings: Settings,
        member: str,
        sender: Sender | Transactions,
        joined: tuple[Any, Rebalance],
        meter: LagMeter,
    ) -> None:
        """Use `open`, which makes the parts."""
        self._settings = settings
        self._member = member
        self._consumer, listener = joined
        listener.owner = self
        self._meter = meter
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        """Guards the next three: the poll thread, kafka-python's own thread, the releases and the loop use them."""
        self._ledgers: dict[Any, Ledger] = {}
        self._unfinished: dict[Place, Message] = {}
        self._buffer: deque[Message] = deque()
        self._arrived = asyncio.Event()
        self._paused = False
        self._closed = False
        self._closing = threading.Event()
        self._next_commit = 0.0
        self._suspect = False
        """The last poll failed: the consumer may stand behind records that it never returned."""
        self._fenced = False
        self._fencings: deque[float] = deque(maxlen=_FENCINGS - 1)
        """When this member was fenced, by `time.monotonic`."""
        self._double: ConfigurationError | None = None
        """Set when another member has this one's identity."""
        self._sender: Sender | None = None
        self._releases: Releases | None = None
        """One of the two publishes: at least once, or exactly once."""
        if isinstance(sender, Sender):
            self._sender = sender
        else:
            self._releases = Releases(sender, self._lock)
            self._releases.start(self, member)
        self._thread = threading.Thread(target=self._run, name=f"kafka-{member}", daemon=True)
        self._thread.start()

    @classmethod
    async def open(cls, settings: Settings, member: str) -> Self:
        """Create the topics that are missing and join the group.

        Raises:
            ConfigurationError: an option is wrong, or a topic is missing and may not be created.
            StreamUnavailable: no broker answered in time.
        """
        replicas = max(settings.intake_replicas, settings.intake_max_replicas or 1)
        if settings.member_id and replicas > 1:
            raise ConfigurationError(
                f"SLUICE_MEMBER_ID names one member, but there may be {replicas} intake replicas: "
                "leave it empty, or run one (SLUICE_INTAKE_REPLICAS, SLUICE_INTAKE_MAX_REPLICAS)."
            )

        def make() -> tuple[Sender | Transactions, tuple[Any, Rebalance], LagMeter]:
            admin = connect(settings, kafka.KafkaAdminClient, client_id=f"{member}-admin")
            try:
                ensure_topics(settings, admin)
                sender = _make_sender(settings)
                joined = subscribe(settings, member)
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
            if self._double is not None:
                raise self._double
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
        """At least once: the records are acknowledged by all in-sync replicas, then the offset is committed.

        Exactly once: both are committed in one transaction, after those of every older offset of the partition.
        """
        place: Place = message.token
        if self._releases is None:
            await self._publish(message, records)
        elif self._closed:
            raise NotOwned(f"{message.source} goes to the other members when this one leaves.")
        else:
            with self._lock:
                self._unfinished.pop(place, None)
            try:
                await self._releases.settle(place, records, message.source)
            except ConfigurationError:
                with self._lock:
                    if place.ledger.holds(place.offset):
                        self._unfinished[place] = message
                raise

    async def _publish(self, message: Message, records: Sequence[Record]) -> None:
        assert self._sender is not None
        place: Place = message.token
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
            self._unfinished.pop(place, None)
        if outcome in (Finish.REVOKED, Finish.NOT_HELD):
            raise NotOwned(f"{message.source} went to another member while it was being published.")

    async def lag(self) -> Lag:
        """End offset minus committed offset, for every partition of the submissions."""
        read = await self._meter.read()
        with self._lock:
            return replace(read, held=frozenset(each.partition for each in self._ledgers))

    def blocked(self) -> Sequence[Message]:
        """One of every partition whose window is nearly full of messages that are done, behind this one."""
        with self._lock:
            blocked = [(each, offset) for each in self._ledgers.values() if (offset := each.blocked_by) is not None]
            messages = (self._unfinished.get(Place(ledger, offset)) for ledger, offset in blocked)
            return [message for message in messages if message is not None]

    def pause(self) -> None:
        """The buffer fills up, then the partitions are paused."""
        self._paused = True

    def resume(self) -> None:
        """The inverse of `pause`."""
        self._paused = False
        self._arrived.set()

    async def close(self) -> None:
        """Commit what is done and leave the group, so that the other members get the rest at once.

        Gives up after about 10 s when the broker is away. With a `member_id` the others get it when the session times
        out, unless this member comes back before.
        """
        if self._closed:
            return
        self._closed = True
        if self._sender is not None:
            await self._sender.close()  # what is being settled is done before the last commit
        if self._releases is not None:
            await asyncio.to_thread(self._releases.flush().wait, _FLUSH_S)
        self._closing.set()
        await asyncio.to_thread(self._thread.join)
        if self._releases is not None:
            await asyncio.to_thread(self._releases.close)
        await self._meter.close()

    # ---- the poll thread

    def _run(self) -> None:
        delays = backoff()
        failing_since: float | None = None
        while not self._closing.is_set():
            try:
                if self._fenced:
                    self._join_again()
                if self._suspect:
                    self._rewind()
                    self._suspect = False
                self._turn()
                if failing_since is not None:
                    delays, failing_since = backoff(), None
            except errors.FencedInstanceIdError:
                self.fenced()
                failing_since = failing_since or time.monotonic()
                self._closing.wait(next(delays))
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
        with self._lock:
            assigned = self._consumer.assignment()
            for partition in assigned:
                if partition not in self._ledgers:
                    self._ledgers[partition] = self._new_ledger()
            room = self._settings.in_flight - len(self._buffer)
            # One poll may bring everything from one partition, so each that is polled has room for a whole one.
            full = {each for each in assigned if room < 1 or self._ledgers[each].room < self._settings.in_flight}
        paused = self._consumer.paused()
        self._consumer.pause(*(full - paused))
        self._consumer.resume(*(paused & assigned - full))
        kafka_consumer.keep_joining(self._consumer)
        kafka_consumer.check_identity(self._consumer)
        kafka_consumer.unpark(self._consumer)
        polled = self._consumer.poll(timeout_ms=_POLL_MS // 10 if full else _POLL_MS, max_records=max(1, room))
        if polled:
            with self._lock:
                owned = self._consumer.assignment()  # some may have been lost while the poll was ending
                for partition, records in polled.items():
                    for record in records if partition in owned else ():
                        self._buffer.append(self._take(partition, record))
            self._wake()
        if time.monotonic() >= self._next_commit:
            offsets = self._committable()
            if self._releases is not None:
                offsets = {}
                self._releases.look()
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
        place = Place(ledger, record.offset)
        self._unfinished[place] = message = as_message(record, place)
        return message

    def _new_ledger(self) -> Ledger:
        return Ledger(max(_WINDOW, _WINDOW_SHARES * self._settings.in_flight), keeps_outputs=self._releases is not None)

    def _rewind(self) -> None:
        """After a poll that failed: what it may have consumed without returning it is fetched again."""
        with self._lock:
            positions = {partition: ledger.position for partition, ledger in self._ledgers.items()}
        for partition in self._consumer.assignment():
            position = positions.get(partition)
            if position is None:
                position = self.committed(partition)
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
            self._unfinished = {place: each for place, each in self._unfinished.items() if place.ledger is not ledger}

    # ---- for the rebalance listener and the releases

    def give_up(self, partitions: Iterable[Any]) -> dict[Any, Any]:
        """Drop what is held of `partitions`. Returns the offsets to commit for them."""
        with self._lock:
            offsets = _as_offsets({each: self._ledgers[each] for each in partitions if each in self._ledgers})
            for partition in partitions:
                self._drop(partition)
        if self._releases is None:
            return offsets
        self._releases.look()
        return {}  # they are committed with outputs or not at all

    def flush(self) -> threading.Event | None:
        """Begin to release what is done. The event tells when that has happened; None: `give_up` says what to do."""
        return self._releases.flush() if self._releases is not None and not self._closing.is_set() else None

    def ledgers(self) -> Mapping[Any, Ledger]:
        """By partition. The caller holds the lock."""
        return self._ledgers

    def group(self) -> Any | None:
        """The consumer's group metadata; None while it is not in the group."""
        return kafka_consumer.group_metadata(self._consumer)

    def committed(self, partition: Any) -> int | None:
        """The group's committed offset, once no transaction that could move it is under way."""
        return kafka_consumer.committed(self._consumer, partition, _LEAVE_MS)

    def fenced(self) -> None:
        """The broker knows this member's id as another's: whatever is held is not this member's any more."""
        self.give_up(tuple(self._ledgers))
        self._fenced = True

    # ---- the poll thread's ends

    def _join_again(self) -> None:
        """After a fencing. Fences, in turn, any other member with this one's id; so one of them has to stop."""
        now = time.monotonic()
        if len(self._fencings) == _FENCINGS - 1 and now - self._fencings[0] < _FENCINGS_S:
            self._double = ConfigurationError(
                f"Another member of {self._settings.group} has joined with SLUICE_MEMBER_ID="
                f"{self._settings.member_id}: give every member one of its own, or none."
            )
            log.error("%s", self._double)
            self._closing.set()
            self._wake()
        elif self._rebuild():
            log.warning("SLUICE_MEMBER_ID=%s was fenced and has joined again", self._settings.member_id)
            self._fencings.append(now)
            self._fenced = False

    def _rebuild(self) -> bool:
        """Replace the consumer. Returns whether that went well."""
        self.give_up(tuple(self._ledgers))
        try:
            consumer, listener = subscribe(self._settings, self._member)
            listener.owner = self
            self._consumer, old = consumer, self._consumer
            self._next_commit = 0.0
            old.close(autocommit=False, timeout_ms=_LEAVE_MS)
        except Exception as error:  # noqa: BLE001 - kafka-python raises more than its own errors
            log.warning("replacing the Kafka consumer failed: %s", error)
            return False
        return True

    def _leave(self) -> None:
        if self._releases is None and self._double is None:
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


def _as_offsets(ledgers: Mapping[Any, Ledger]) -> dict[Any, Any]:
    return {
        partition: OffsetAndMetadata(ledger.committable, "", -1)
        for partition, ledger in ledgers.items()
        if ledger.committable is not None
    }


def _make_sender(settings: Settings) -> Sender | Transactions:
    if settings.delivery == "at_least_once":
        return Sender(settings, delivery_s=_DELIVERY_S)
    # A member that comes back as the same one ends what its earlier life had begun; any other has an id of its own. A
    # member's own id has no slash, so no two groups can share one.
    return Transactions(settings, f"{settings.group}/{settings.member_id or uuid.uuid4().hex}")

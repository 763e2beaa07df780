"""The group consumer on Apache Kafka: one kafka-python consumer in a thread of its own, and one producer.

The thread polls independently of the event loop, so a slow assessment does not end the membership. Received messages
wait in a bounded buffer. When the buffer or the window of a partition is full, the partitions are paused.

At least once: offsets are committed as far as the trackers allow, every `_COMMIT_S`, on revocation and on close.
Exactly once: they are committed with the outputs, by `TransactionalCommitter`. `commits` has every call that commits.
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
from functools import partial
from typing import Any, Final, Self

import kafka
from kafka import errors

from services.core.errors import ConfigurationError, NotOwned
from services.core.retry import backoff
from services.streams.base import Lag, Message, OutgoingMessage
from services.streams.config import StreamConfig
from services.streams.kafka import commits, compat, rebalance
from services.streams.kafka.client import MAX_BACKOFF_S, connect, ensure_topics, to_message
from services.streams.kafka.commits import commit_before_leaving, commit_in_background
from services.streams.kafka.exactly_once import MessageToken, TransactionalCommitter
from services.streams.kafka.lag import LagMeter
from services.streams.kafka.offset_tracker import FinishResult, OffsetTracker
from services.streams.kafka.producer import AtLeastOnceSender
from services.streams.kafka.rebalance import Rebalance, subscribe
from services.streams.kafka.transactions import TransactionalSender

log = logging.getLogger(__name__)

_COMMIT_S: Final = 0.5
_COMMIT_TIMEOUT_S: Final = 35.0
"""Without an answer for this long, a commit counts as failed. Longer than any request may take."""
_POLL_MS: Final = 200
"""The longest wait of one poll for records."""
_WINDOW_OFFSETS: Final = 4096
"""Offsets per partition between the oldest unfinished one and the newest received one."""
_WINDOW_MULTIPLE: Final = 16
"""The window is at least this many times `in_flight`. A partition with less than `in_flight` left is paused."""
_REBUILD_S: Final = 30.0
"""After polls have failed for this long, the consumer is replaced."""
_FENCINGS_LIMIT: Final = 4
_FENCINGS_S: Final = 60.0
"""A restarted broker may fence the only member of an id once, so a fenced member joins again. `_FENCINGS_LIMIT`
fencings within this time mean that a second member has the id."""
_OWNERS_CHECK_S: Final = 5.0
"""How often a member with a `member_id` looks for partitions without an owner."""
_LEAVE_MS: Final = 3_000
"""Time limit of each request with which a member leaves its group, and of a request for committed offsets."""
_DELIVERY_S: Final = 30.0
"""At least once: how long one try to publish may take."""
_FLUSH_S: Final = 3.0
"""Exactly once: how long a member that leaves waits for its last transaction."""


class KafkaGroupConsumer:
    """One member of a consumer group. See `GroupConsumer` for what the methods promise."""

    def __init__(
        self,
        config: StreamConfig,
        member: str,
        sender: AtLeastOnceSender | TransactionalSender,
        joined: tuple[Any, Rebalance],
        meter: LagMeter,
    ) -> None:
        """Use `open`, which makes the parts."""
        self._config = config
        self._member = member
        self._consumer, self._rebalance = joined
        self._rebalance.owner = self
        self._meter = meter
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        """Guards `_trackers`, `_held_messages` and `_buffer`, which four threads use: the event loop's, the poll
        thread, kafka-python's own and the committer's."""
        self._trackers: dict[Any, OffsetTracker] = {}
        self._held_messages: dict[MessageToken, Message] = {}
        self._buffer: deque[Message] = deque()
        self._arrived = asyncio.Event()
        self._closed = False
        self._closing = threading.Event()
        self._next_commit = 0.0
        self._position_uncertain = False
        """The last poll failed, so the consumer's position may be after records that it never returned."""
        self._fenced = False
        self._fencings: deque[float] = deque(maxlen=_FENCINGS_LIMIT - 1)
        """When this member was fenced, by `time.monotonic`."""
        self._duplicate_member: ConfigurationError | None = None
        """Set when another member has the `member_id` of this one."""
        self._sender: AtLeastOnceSender | None = None
        self._committer: TransactionalCommitter | None = None
        """Either `_sender` (at least once) or `_committer` (exactly once) is set."""
        if isinstance(sender, AtLeastOnceSender):
            self._sender = sender
        else:
            self._committer = TransactionalCommitter(sender, self._lock)
            self._committer.start(self, member)
        self._thread = threading.Thread(target=self._run, name=f"kafka-{member}", daemon=True)
        self._thread.start()
        self._watching = asyncio.create_task(self._watch_owners()) if config.member_id else None

    @classmethod
    async def open(cls, config: StreamConfig, member: str) -> Self:
        """Create the topics that are missing and join the group.

        Raises:
            ConfigurationError: an option is wrong, or a topic is missing and may not be created.
            StreamUnavailable: no broker answered in time.
        """
        if config.member_id and config.max_members > 1:
            raise ConfigurationError(
                f"SLUICE_MEMBER_ID names one member, but there may be {config.max_members} intake replicas: "
                "leave it empty, or run one (SLUICE_INTAKE_REPLICAS, SLUICE_INTAKE_MAX_REPLICAS)."
            )

        def make() -> tuple[AtLeastOnceSender | TransactionalSender, tuple[Any, Rebalance], LagMeter]:
            admin = connect(config, kafka.KafkaAdminClient, client_id=f"{member}-admin")
            try:
                ensure_topics(config, admin)
                sender = _make_sender(config)
                joined = subscribe(config, member)
            except BaseException:
                admin.close()
                raise
            return sender, joined, LagMeter(config, admin)

        sender, joined, meter = await asyncio.to_thread(make)
        return cls(config, member, sender, joined, meter)

    async def receive(self, max_messages: int, timeout_s: float) -> Sequence[Message]:
        """In offset order per partition."""
        deadline = self._loop.time() + timeout_s
        while True:
            if self._duplicate_member is not None:
                raise self._duplicate_member
            self._arrived.clear()
            with self._lock:
                batch = [self._buffer.popleft() for _ in range(min(max_messages, len(self._buffer)))]
            if batch:
                return batch
            remaining = deadline - self._loop.time()
            if remaining <= 0:
                return []
            try:
                await asyncio.wait_for(self._arrived.wait(), remaining)
            except TimeoutError:
                return []

    async def settle(self, message: Message, records: Sequence[OutgoingMessage]) -> None:
        """At least once: returns when all in-sync replicas have acknowledged the records. `_poll_once` commits the
        offset later, when no older offset of the partition is held.

        Exactly once: both are committed in one transaction, after those of every older offset of the partition.
        """
        token: MessageToken = message.token
        if self._committer is None:
            await self._publish(message, records)
        elif self._closed:
            raise NotOwned(f"{message.source} goes to the other members when this one leaves.")
        else:
            with self._lock:
                self._held_messages.pop(token, None)
            try:
                await self._committer.settle(token, records, message.source)
            except ConfigurationError:
                with self._lock:
                    if token.tracker.holds(token.offset):
                        self._held_messages[token] = message
                raise

    async def _publish(self, message: Message, records: Sequence[OutgoingMessage]) -> None:
        assert self._sender is not None
        token: MessageToken = message.token
        pending = list(records)
        for delay in backoff(MAX_BACKOFF_S):
            if not token.tracker.holds(token.offset):
                raise NotOwned(f"{message.source} belongs to another member now.")
            pending = await self._sender.send(pending)
            if not pending:
                break
            await asyncio.sleep(delay)
        with self._lock:
            outcome = token.tracker.finish(token.offset)
            self._held_messages.pop(token, None)
        if outcome in (FinishResult.REVOKED, FinishResult.NOT_HELD):
            raise NotOwned(f"{message.source} went to another member while it was being published.")

    async def lag(self) -> Lag:
        """End offset minus committed offset, for every partition of the submissions."""
        read = await self._meter.read()
        with self._lock:
            return replace(read, owned_partitions=frozenset(each.partition for each in self._trackers))

    def find_head_of_line_messages(self) -> Sequence[Message]:
        """The oldest held message of each partition whose window is nearly full of done messages."""
        with self._lock:
            tokens = [
                MessageToken(tracker, offset)
                for tracker in self._trackers.values()
                if (offset := tracker.head_of_line_offset) is not None
            ]
            messages = (self._held_messages.get(token) for token in tokens)
            return [message for message in messages if message is not None]

    async def close(self) -> None:
        """Commit the done offsets and leave the group, so that other members get the held messages at once.

        During an outage it gives up after about 10 s. With a `member_id` other members get the messages only after the
        session timeout, and only if no member with this id has joined by then.
        """
        if self._closed:
            return
        self._closed = True
        if self._sender is not None:
            await self._sender.close()  # before the last commit, so that it includes these messages
        if self._committer is not None:
            await asyncio.to_thread(self._committer.flush().wait, _FLUSH_S)
        if self._watching is not None:
            self._watching.cancel()
        self._closing.set()
        await asyncio.to_thread(self._thread.join)
        if self._committer is not None:
            await asyncio.to_thread(self._committer.close)
        await self._meter.close()

    async def _watch_owners(self) -> None:
        """Let the group rebalance if a partition has no owner.

        A member that has to hand a partition over gives it up and then joins again; the rebalance that this begins
        assigns the partition. If the member is killed before it joins, and restarts with its `member_id`, it gets what
        was left to it without a rebalance. So nobody would ever own the partition.
        """
        before: frozenset[int] = frozenset()
        while True:
            await asyncio.sleep(_OWNERS_CHECK_S)
            try:
                unowned = await self._meter.find_unowned_partitions()
            except Exception as error:  # noqa: BLE001 - kafka-python raises more than its own errors
                log.info("looking for partitions without an owner failed; retrying in %g s: %s", _OWNERS_CHECK_S, error)
                unowned = frozenset()
            if unowned & before:  # found twice, so it is not a hand-over
                log.warning(
                    "partitions of %s without an owner: %s; the group rebalances",
                    *(self._config.submissions_stream, sorted(unowned & before)),
                )
                self._rebalance.request()
                unowned = frozenset()
            before = unowned

    # ---- the poll thread

    def _run(self) -> None:
        delays = backoff(MAX_BACKOFF_S)
        failing_since: float | None = None
        while not self._closing.is_set():
            try:
                if self._fenced:
                    self._rejoin()
                if self._position_uncertain:
                    self._rewind()
                    self._position_uncertain = False
                self._poll_once()
                if failing_since is not None:
                    delays, failing_since = backoff(MAX_BACKOFF_S), None
            except errors.FencedInstanceIdError:
                self.on_fenced()
                failing_since = failing_since or time.monotonic()
                self._closing.wait(next(delays))
            except Exception as error:  # noqa: BLE001 - the membership must not end with one bad poll
                log.warning("polling Kafka failed; retrying: %s: %s", type(error).__name__, error)
                self._position_uncertain = True
                failing_since = failing_since or time.monotonic()
                if time.monotonic() - failing_since > _REBUILD_S:
                    self._rebuild()
                    failing_since = time.monotonic()
                self._closing.wait(next(delays))
        self._leave()

    def _poll_once(self) -> None:
        with self._lock:
            assigned = self._consumer.assignment()
            for partition in assigned:
                if partition not in self._trackers:
                    self._trackers[partition] = self._new_tracker()
            room = self._config.in_flight - len(self._buffer)
            # One poll may return records of one partition only, so each polled partition needs room for a whole poll.
            full = {each for each in assigned if room < 1 or self._trackers[each].room < self._config.in_flight}
        paused = self._consumer.paused()
        self._consumer.pause(*(full - paused))
        self._consumer.resume(*(paused & assigned - full))
        compat.request_missed_rejoin(self._consumer)
        compat.raise_if_fenced(self._consumer)
        compat.restore_paused_records(self._consumer)
        polled = self._consumer.poll(timeout_ms=_POLL_MS // 10 if full else _POLL_MS, max_records=max(1, room))
        if polled:
            with self._lock:
                owned = self._consumer.assignment()  # the poll may have ended with a loss of partitions
                for partition, records in polled.items():
                    for record in records if partition in owned else ():
                        self._buffer.append(self._track(partition, record))
            self._notify_receivers()
        if time.monotonic() >= self._next_commit:
            offsets = self._find_committable()
            if self._committer is not None:
                offsets = {}
                self._committer.wake()
            # One commit at a time: its callback, which a later poll calls, allows the next one.
            self._next_commit = time.monotonic() + (_COMMIT_TIMEOUT_S if offsets else _COMMIT_S)
            if offsets:
                commit_in_background(self._consumer, offsets, partial(self._end_commit, offsets))

    def _track(self, partition: Any, record: Any) -> Message:
        tracker = self._trackers.get(partition)
        if tracker is None:  # assigned during this very poll
            tracker = self._trackers[partition] = self._new_tracker()
        if tracker.position is not None and record.offset < tracker.position:
            # The log was truncated (an unclean leader election, or a re-created topic): these are other messages.
            log.warning(
                "the log of %s was truncated from offset %d to %d; its held messages are dropped",
                *(partition, tracker.position, record.offset),
            )
            self._drop_partition(partition)
            tracker = self._trackers[partition] = self._new_tracker()
        tracker.receive(record.offset)
        token = MessageToken(tracker, record.offset)
        self._held_messages[token] = message = to_message(record, token)
        return message

    def _new_tracker(self) -> OffsetTracker:
        return OffsetTracker(
            max(_WINDOW_OFFSETS, _WINDOW_MULTIPLE * self._config.in_flight), keeps_outputs=self._committer is not None
        )

    def _rewind(self) -> None:
        """Seek back after a failed poll: it may have consumed records without returning them."""
        with self._lock:
            positions = {partition: tracker.position for partition, tracker in self._trackers.items()}
        for partition in self._consumer.assignment():
            position = positions.get(partition)
            if position is None:
                position = self.fetch_committed(partition)
            if position is None:
                self._consumer.seek_to_beginning(partition)
            else:
                self._consumer.seek(partition, position)

    def _find_committable(self) -> dict[Any, int]:
        positions = {}
        for partition in self._consumer.assignment():
            tracker = self._trackers.get(partition)
            if tracker is not None and not tracker.held_count and not self._position_uncertain:
                # Commit past offsets without a message (transaction markers), otherwise the lag never reaches 0.
                with contextlib.suppress(errors.KafkaError):  # not known yet
                    positions[partition] = self._consumer.position(partition, timeout_ms=0)
        with self._lock:
            for partition, position in positions.items():
                if position is not None and partition in self._trackers:
                    self._trackers[partition].skip(position)
            return _collect_committable(self._trackers)

    def _end_commit(self, offsets: Mapping[Any, int], error: Exception | None) -> None:
        self._next_commit = time.monotonic() + _COMMIT_S
        if error is not None:
            log.info("a commit failed; the next one includes its offsets: %s", error)
            return
        with self._lock:
            for partition, offset in offsets.items():
                if partition in self._trackers:
                    self._trackers[partition].record_commit(offset)

    def _drop_partition(self, partition: Any) -> None:
        """Drop the held messages of a partition. The caller holds the lock."""
        tracker = self._trackers.pop(partition, None)
        if tracker is not None:
            tracker.revoke()
            self._buffer = deque(each for each in self._buffer if each.token.tracker is not tracker)
            self._held_messages = {
                token: each for token, each in self._held_messages.items() if token.tracker is not tracker
            }

    # ---- called by the rebalance listener and the committer

    def drop_partitions(self, partitions: Iterable[Any]) -> dict[Any, int]:
        """Drop the held messages of `partitions`. Returns the offsets to commit for them."""
        with self._lock:
            offsets = _collect_committable(
                {each: self._trackers[each] for each in partitions if each in self._trackers}
            )
            for partition in partitions:
                self._drop_partition(partition)
        if self._committer is None:
            return offsets
        self._committer.wake()
        return {}  # exactly once: the committer commits offsets with their outputs

    def flush(self) -> threading.Event | None:
        """Start to commit done offsets. The event is set afterwards. None: commit what `drop_partitions` returns."""
        return self._committer.flush() if self._committer is not None and not self._closing.is_set() else None

    def trackers(self) -> Mapping[Any, OffsetTracker]:
        """By partition. The caller holds the lock."""
        return self._trackers

    def get_group_metadata(self) -> Any | None:
        """The consumer's group metadata; None while it is not in the group."""
        return rebalance.get_group_metadata(self._consumer)

    def fetch_committed(self, partition: Any) -> int | None:
        """The group's committed offset, once no transaction that could move it is under way."""
        return commits.fetch_committed(self._consumer, partition, _LEAVE_MS)

    def on_fenced(self) -> None:
        """Drop all held messages: the broker has fenced this member."""
        self.drop_partitions(tuple(self._trackers))
        self._fenced = True

    # ---- rejoining and leaving

    def _rejoin(self) -> None:
        """Join again after a fencing. That fences the other member with this id, if there is one.

        After `_FENCINGS_LIMIT` fencings this member stops instead.
        """
        now = time.monotonic()
        if len(self._fencings) == _FENCINGS_LIMIT - 1 and now - self._fencings[0] < _FENCINGS_S:
            self._duplicate_member = ConfigurationError(
                f"Another member of {self._config.group} has joined with SLUICE_MEMBER_ID="
                f"{self._config.member_id}: give each member its own id, or none."
            )
            log.error("%s", self._duplicate_member)
            self._closing.set()
            self._notify_receivers()
        elif self._rebuild():
            log.warning("SLUICE_MEMBER_ID=%s was fenced and has joined again", self._config.member_id)
            self._fencings.append(now)
            self._fenced = False

    def _rebuild(self) -> bool:
        """Replace the consumer. Returns whether that went well."""
        self.drop_partitions(tuple(self._trackers))
        try:
            consumer, listener = subscribe(self._config, self._member)
            listener.owner = self
            self._rebalance = listener
            self._consumer, old = consumer, self._consumer
            self._next_commit = 0.0
            old.close(autocommit=False, timeout_ms=_LEAVE_MS)
        except Exception as error:  # noqa: BLE001 - kafka-python raises more than its own errors
            log.warning("replacing the Kafka consumer failed: %s", error)
            return False
        return True

    def _leave(self) -> None:
        if self._committer is None and self._duplicate_member is None:
            commit_before_leaving(self._consumer, self._find_committable(), _LEAVE_MS)
        self.drop_partitions(tuple(self._trackers))
        try:
            self._consumer.close(autocommit=False, timeout_ms=_LEAVE_MS)
        except Exception as error:  # noqa: BLE001 - kafka-python raises more than its own errors
            log.warning("leaving the group failed: %s", error)

    def _notify_receivers(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._arrived.set)
        except RuntimeError:  # the loop has ended, and every waiter with it
            self._closing.set()


def _collect_committable(trackers: Mapping[Any, OffsetTracker]) -> dict[Any, int]:
    return {
        partition: tracker.committable for partition, tracker in trackers.items() if tracker.committable is not None
    }


def _make_sender(config: StreamConfig) -> AtLeastOnceSender | TransactionalSender:
    if config.delivery == "at_least_once":
        return AtLeastOnceSender(config, delivery_s=_DELIVERY_S)
    # With a fixed id a restarted member ends the transaction of its earlier start. Without one each start has a new id.
    # A `member_id` contains no slash, so two groups never share a transactional id.
    return TransactionalSender(config, f"{config.group}/{config.member_id or uuid.uuid4().hex}")

"""Exactly-once delivery on Kafka: outputs are published in the order of the offsets, one transaction at a time.

A thread takes the oldest done offsets of every partition from the trackers, publishes their outputs and commits the
offsets in one transaction. Only then does `settle` return. After an aborted transaction the trackers still hold its
outputs, so the next transaction includes them. Messages of a revoked partition are left to its next owner.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from services.core.errors import ConfigurationError, NotOwned
from services.core.retry import backoff
from services.streams.base import OutgoingMessage
from services.streams.kafka.offset_tracker import CommittableBatch, FinishResult, OffsetTracker
from services.streams.kafka.transactions import CommitOutcome, TransactionalSender

log = logging.getLogger(__name__)

_INTERVAL_S: Final = 0.1
_MESSAGES_LIMIT: Final = 500
"""Messages of one transaction. When this many are done, the transaction begins at once."""
_CLOSE_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class MessageToken:
    """A message's token: its offset, and the tracker of the assignment under which it was received."""

    tracker: OffsetTracker
    offset: int


class Membership(Protocol):
    """The member of the group, as the committer sees it. Called from the committer's thread."""

    def trackers(self) -> Mapping[Any, OffsetTracker]:
        """By partition. The caller holds the lock."""

    def get_group_metadata(self) -> Any | None:
        """The consumer's group metadata; None while it is not in the group."""

    def fetch_committed(self, partition: Any) -> int | None:
        """The group's committed offset, after every pending transaction that could move it. Raises on failure."""

    def on_fenced(self) -> None:
        """The broker has fenced this member: another member has joined with its id."""


@dataclass(frozen=True, slots=True)
class _PartitionBatch:
    """The part of a transaction that belongs to one partition."""

    partition: Any
    tracker: OffsetTracker
    batch: CommittableBatch


class TransactionalCommitter:
    """Publishes and commits the done offsets of one member. Only `settle` belongs to the event loop."""

    def __init__(self, transactions: TransactionalSender, lock: threading.Lock) -> None:
        """`lock` guards the trackers. Takes over `transactions`."""
        self._transactions = transactions
        self._lock = lock
        self._loop = asyncio.get_running_loop()
        self._settling: dict[MessageToken, asyncio.Future[None]] = {}
        """Guarded by the lock, as the trackers are."""
        self._changed = threading.Condition()
        """Guards `_finished`, `_wake_requested`, `_flushing` and `_closing`."""
        self._finished = 0
        self._wake_requested = False
        self._flushing: list[threading.Event] = []
        self._closing = False
        self._max_messages = _MESSAGES_LIMIT
        self._first_partition = 0
        self._thread: threading.Thread | None = None

    def start(self, membership: Membership, name: str) -> None:
        """Start the thread."""
        self._thread = threading.Thread(
            target=self._run, args=(membership,), name=f"kafka-committer-{name}", daemon=True
        )
        self._thread.start()

    async def settle(self, token: MessageToken, records: Sequence[OutgoingMessage], source: str) -> None:
        """Returns when a transaction with `records` and the offset is committed.

        Raises:
            NotOwned: the partition went to another member before that.
            ConfigurationError: a topic rejects one of the records. The offset is held again.
        """
        future: asyncio.Future[None] = self._loop.create_future()
        with self._lock:
            if token.tracker.finish(token.offset, records) in (FinishResult.REVOKED, FinishResult.NOT_HELD):
                raise NotOwned(f"{source} belongs to another member now.")
            self._settling[token] = future
        with self._changed:
            self._finished += 1
            self._changed.notify()
        try:
            await future
        except NotOwned:
            raise NotOwned(f"{source} went to another member before it was published.") from None

    def wake(self) -> None:
        """Check for offsets to commit, and for waiters whose partition was revoked."""
        with self._changed:
            self._wake_requested = True
            self._changed.notify()

    def flush(self) -> threading.Event:
        """Commit the done offsets without waiting for more. The event is set afterwards."""
        flushed = threading.Event()
        with self._changed:
            self._flushing.append(flushed)
            self._changed.notify()
        return flushed

    def close(self) -> None:
        """Stop, and release the connections. Each `settle` that still waits raises `NotOwned`."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._transactions.stop()
        if self._thread is not None:
            self._thread.join(_CLOSE_S)
        self._transactions.close()
        with self._lock:
            left = list(self._settling)
        self._resolve_waiters(left, NotOwned("left"))

    # ---- the thread

    def _run(self, membership: Membership) -> None:
        began = 0.0
        delays = backoff(1.0)
        while (flushing := self._wait_for_work(began)) is not None:
            began = time.monotonic()
            succeeded = False
            try:
                succeeded = self._commit_all(membership)
            except ConfigurationError as error:
                log.error("publishing to Kafka failed; retrying: %s", error)
            except Exception:
                log.exception("committing a transaction failed; retrying")
            self._reject_revoked()
            if succeeded:
                delays = backoff(1.0)
                for each in flushing:
                    each.set()
                continue
            with self._changed:
                self._wake_requested = True
                self._flushing += flushing
                if not self._closing:
                    self._changed.wait_for(lambda: self._closing, next(delays))

    def _wait_for_work(self, began: float) -> list[threading.Event] | None:
        """Wait for done offsets. Returns the events to set after the commit; None: the committer is closing."""
        with self._changed:
            while not (self._closing or self._flushing or self._finished >= _MESSAGES_LIMIT):
                remaining = began + _INTERVAL_S - time.monotonic()
                if (self._finished or self._wake_requested) and remaining <= 0:
                    break
                self._changed.wait(max(0.0, remaining) if self._finished or self._wake_requested else None)
            if self._closing:
                return None
            flushing, self._flushing = self._flushing, []
            self._finished, self._wake_requested = 0, False
            return flushing

    def _commit_all(self, membership: Membership) -> bool:
        """Commit all done offsets. Returns whether that succeeded."""
        if not self._transactions.ready():  # an open transaction of a failed commit blocks readers
            return False
        while batches := self._collect_batches(membership):
            check_ownership = self._ownership_check(membership, batches)
            if check_ownership() is None:
                return False
            outcome, detail = self._transactions.publish(
                [record for each in batches for record in each.batch.outputs],
                {each.partition: each.batch.committable for each in batches},
                check_ownership,
            )
            if outcome is CommitOutcome.UNKNOWN:
                log.warning("the outcome of a transaction is unknown; reading the committed offsets: %s", detail)
                outcome = self._resolve_unknown_commit(membership, batches)
            if not self._apply_outcome(membership, batches, outcome, detail):
                return False
        return True

    def _collect_batches(self, membership: Membership) -> list[_PartitionBatch]:
        batches = []
        room = self._max_messages
        self._first_partition += 1
        with self._lock:
            trackers = list(membership.trackers().items())
            # Another partition is first each time, so that a busy one leaves room for the others.
            first = self._first_partition % len(trackers) if trackers else 0
            for partition, tracker in trackers[first:] + trackers[:first]:
                batch = tracker.next_batch(room) if room else None
                if batch is not None:
                    batches.append(_PartitionBatch(partition, tracker, batch))
                    room -= len(batch.offsets)
        return batches

    def _ownership_check(self, membership: Membership, batches: Sequence[_PartitionBatch]) -> Callable[[], Any | None]:
        def check_ownership() -> Any | None:
            # The order matters. A partition that this member still owns after it read the metadata has no other owner
            # in their generation. In a later generation the broker rejects the metadata.
            group = membership.get_group_metadata()
            with self._lock:
                return None if any(each.tracker.revoked for each in batches) else group

        return check_ownership

    def _apply_outcome(
        self, membership: Membership, batches: Sequence[_PartitionBatch], outcome: CommitOutcome, detail: str
    ) -> bool:
        """Update the trackers and the waiters. Returns whether to continue at once."""
        tokens = [MessageToken(each.tracker, offset) for each in batches for offset in each.batch.offsets]
        if outcome is CommitOutcome.COMMITTED:
            with self._lock:
                for each in batches:
                    each.tracker.record_transaction(each.batch)
            self._resolve_waiters(tokens)
            self._max_messages = min(_MESSAGES_LIMIT, 2 * self._max_messages)
            return True
        if outcome is CommitOutcome.REJECTED and len(tokens) == 1:
            with self._lock:
                tokens[0].tracker.abandon(tokens[0].offset)
            self._resolve_waiters(
                tokens,
                ConfigurationError(
                    f"Kafka rejects the outputs of a message: {detail}. Raise the topic's max.message.bytes."
                ),
            )
            self._max_messages = _MESSAGES_LIMIT
            return True
        if outcome is CommitOutcome.REJECTED:
            # One rejected record fails the whole transaction, so halve it until the record is alone.
            self._max_messages = max(1, len(tokens) // 2)
            return True
        if outcome is CommitOutcome.FENCED:
            membership.on_fenced()
        log.info("a transaction was not committed: %s", detail)
        return False

    def _resolve_unknown_commit(self, membership: Membership, batches: Sequence[_PartitionBatch]) -> CommitOutcome:
        """Find out from the committed offsets whether a transaction was committed whose answer was lost."""
        delays = backoff(1.0)
        while not self._closing:
            probe = next((each for each in batches if each.batch.offsets and not each.tracker.revoked), None)
            if probe is None:
                break
            try:
                if self._transactions.recover():
                    committed = membership.fetch_committed(probe.partition)
                    if not probe.tracker.revoked:  # so only this member can have committed it
                        found = committed is not None and committed >= probe.batch.committable
                        return CommitOutcome.COMMITTED if found else CommitOutcome.ABORTED
            except Exception as error:  # noqa: BLE001 - kafka-python raises more than its own errors
                log.warning("reading the committed offsets failed; retrying: %s: %s", type(error).__name__, error)
            with self._changed:
                self._changed.wait_for(lambda: self._closing, next(delays))
        return CommitOutcome.ABORTED

    def _reject_revoked(self) -> None:
        """Raise `NotOwned` in each `settle` whose partition was revoked."""
        with self._lock:
            revoked = [token for token in self._settling if token.tracker.revoked]
        self._resolve_waiters(revoked, NotOwned("revoked"))

    def _resolve_waiters(self, tokens: Sequence[MessageToken], error: Exception | None = None) -> None:
        with self._lock:
            futures = [future for token in tokens if (future := self._settling.pop(token, None)) is not None]
        try:
            self._loop.call_soon_threadsafe(_resolve_futures, futures, error)
        except RuntimeError:  # the loop has ended, and every waiter with it
            return


def _resolve_futures(futures: Sequence["asyncio.Future[None]"], error: Exception | None) -> None:
    for future in futures:
        if future.done():  # its waiter was cancelled
            continue
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

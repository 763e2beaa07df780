"""Exactly-once delivery on Kafka: what is done is published in the order of its offsets, one transaction at a time.

A thread takes the oldest done offsets of every partition from the ledgers, publishes their outputs and commits the
offsets in one transaction, and only then tells whoever settled them. Of a transaction that was aborted nothing needs to
be remembered: the ledgers still hold all of it, for the next one. What belongs to a partition that was revoked is left
to its next owner.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from services.core.errors import ConfigurationError, NotOwned
from services.streams.base import Record
from services.streams.kafka.client import backoff
from services.streams.kafka.offsets import Finish, Ledger, Releasable
from services.streams.kafka.transactions import Outcome, Transactions

log = logging.getLogger(__name__)

_EVERY_S: Final = 0.1
_MESSAGES: Final = 500
"""Of one transaction. When as many are done it begins at once."""
_END_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Place:
    """A message's token: its offset, and the ledger of the assignment under which it was received."""

    ledger: Ledger
    offset: int


class Membership(Protocol):
    """What the releases ask of the group's member. Called from their thread."""

    def ledgers(self) -> Mapping[Any, Ledger]:
        """By partition. The caller holds the lock."""

    def group(self) -> Any | None:
        """The consumer's group metadata; None while it is not in the group."""

    def committed(self, partition: Any) -> int | None:
        """The group's committed offset, once no transaction that could move it is under way. Raises when it cannot."""

    def fenced(self) -> None:
        """The broker knows this member's id as another's."""


@dataclass(frozen=True, slots=True)
class _Portion:
    """What one transaction takes of one partition."""

    partition: Any
    ledger: Ledger
    releasable: Releasable


class Releases:
    """The done offsets of one member on their way out. `settle` belongs to the event loop, the rest to any thread."""

    def __init__(self, transactions: Transactions, lock: threading.Lock) -> None:
        """`lock` guards the ledgers. Takes over `transactions`."""
        self._transactions = transactions
        self._lock = lock
        self._loop = asyncio.get_running_loop()
        self._settling: dict[Place, asyncio.Future[None]] = {}
        """Guarded by the lock, as the ledgers are."""
        self._changed = threading.Condition()
        """Guards the next four."""
        self._finished = 0
        self._asked = False
        self._flushing: list[threading.Event] = []
        self._closing = False
        self._limit = _MESSAGES
        self._turn = 0
        self._thread: threading.Thread | None = None

    def start(self, membership: Membership, name: str) -> None:
        """Begin to release."""
        self._thread = threading.Thread(
            target=self._run, args=(membership,), name=f"kafka-releases-{name}", daemon=True
        )
        self._thread.start()

    async def settle(self, place: Place, records: Sequence[Record], source: str) -> None:
        """Returns when a transaction with `records` and the offset is committed.

        Raises:
            NotOwned: the partition went to another member before that.
            ConfigurationError: a topic refuses one of the records. The offset is held again.
        """
        future: asyncio.Future[None] = self._loop.create_future()
        with self._lock:
            if place.ledger.finish(place.offset, records) in (Finish.REVOKED, Finish.NOT_HELD):
                raise NotOwned(f"{source} belongs to another member by now.")
            self._settling[place] = future
        with self._changed:
            self._finished += 1
            self._changed.notify()
        try:
            await future
        except NotOwned:
            raise NotOwned(f"{source} went to another member before it was published.") from None

    def look(self) -> None:
        """There may be something to release, or somebody to tell that nothing will be."""
        with self._changed:
            self._asked = True
            self._changed.notify()

    def flush(self) -> threading.Event:
        """Release what is done now without waiting for more. The event is set when that has happened."""
        flushed = threading.Event()
        with self._changed:
            self._flushing.append(flushed)
            self._changed.notify()
        return flushed

    def close(self) -> None:
        """Stop, and release the connections. Whoever still waits is told that the message is not owned."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._transactions.stop()
        if self._thread is not None:
            self._thread.join(_END_S)
        self._transactions.close()
        with self._lock:
            left = list(self._settling)
        self._tell(left, NotOwned("left"))

    # ---- the thread

    def _run(self, membership: Membership) -> None:
        began = 0.0
        delays = backoff(1.0)
        while (flushing := self._await_work(began)) is not None:
            began = time.monotonic()
            went_well = False
            try:
                went_well = self._release_all(membership)
            except ConfigurationError as error:
                log.error("cannot publish, trying on: %s", error)
            except Exception:
                log.exception("releasing failed, trying on")
            self._dismiss()
            if went_well:
                delays = backoff(1.0)
                for each in flushing:
                    each.set()
                continue
            with self._changed:
                self._asked = True
                self._flushing += flushing
                if not self._closing:
                    self._changed.wait_for(lambda: self._closing, next(delays))

    def _await_work(self, began: float) -> list[threading.Event] | None:
        """Who waits for this turn's end; None when there is to be no further turn."""
        with self._changed:
            while not (self._closing or self._flushing or self._finished >= _MESSAGES):
                remaining = began + _EVERY_S - time.monotonic()
                if (self._finished or self._asked) and remaining <= 0:
                    break
                self._changed.wait(max(0.0, remaining) if self._finished or self._asked else None)
            if self._closing:
                return None
            flushing, self._flushing = self._flushing, []
            self._finished, self._asked = 0, False
            return flushing

    def _release_all(self, membership: Membership) -> bool:
        """Whether everything that was done is released now."""
        if not self._transactions.ready():  # what a failure left open holds others up
            return False
        while portions := self._take(membership):
            confirm = self._confirmer(membership, portions)
            if confirm() is None:
                return False
            outcome, words = self._transactions.publish(
                [record for portion in portions for record in portion.releasable.outputs],
                {portion.partition: portion.releasable.committable for portion in portions},
                confirm,
            )
            if outcome is Outcome.UNKNOWN:
                log.warning("a transaction's end is not known, asking for the offsets: %s", words)
                outcome = self._find_out(membership, portions)
            if not self._conclude(membership, portions, outcome, words):
                return False
        return True

    def _take(self, membership: Membership) -> list[_Portion]:
        portions = []
        room = self._limit
        self._turn += 1
        with self._lock:
            ledgers = list(membership.ledgers().items())
            first = self._turn % len(ledgers) if ledgers else 0  # so that a busy partition leaves room for the others
            for partition, ledger in ledgers[first:] + ledgers[:first]:
                releasable = ledger.releasable(room) if room else None
                if releasable is not None:
                    portions.append(_Portion(partition, ledger, releasable))
                    room -= len(releasable.offsets)
        return portions

    def _confirmer(self, membership: Membership, portions: Sequence[_Portion]) -> Callable[[], Any | None]:
        def confirm() -> Any | None:
            # In this order: nobody else can own a partition, that was still owned after the metadata were taken, in
            # the generation that they name. In a later one the broker refuses them.
            group = membership.group()
            with self._lock:
                return None if any(portion.ledger.revoked for portion in portions) else group

        return confirm

    def _conclude(self, membership: Membership, portions: Sequence[_Portion], outcome: Outcome, words: str) -> bool:
        """Whether to go on at once."""
        places = [Place(each.ledger, offset) for each in portions for offset in each.releasable.offsets]
        if outcome is Outcome.COMMITTED:
            with self._lock:
                for portion in portions:
                    portion.ledger.release(portion.releasable)
            self._tell(places)
            self._limit = min(_MESSAGES, 2 * self._limit)
            return True
        if outcome is Outcome.REFUSED and len(places) == 1:
            with self._lock:
                places[0].ledger.refuse(places[0].offset)
            self._tell(
                places,
                ConfigurationError(
                    f"Kafka refuses the outputs of a message: {words}. Raise the topic's max.message.bytes."
                ),
            )
            self._limit = _MESSAGES
            return True
        if outcome is Outcome.REFUSED:
            # Any of them can be to blame, because one that is refused takes all the others with it.
            self._limit = max(1, len(places) // 2)
            return True
        if outcome is Outcome.FENCED:
            membership.fenced()
        log.info("a transaction was not committed: %s", words)
        return False

    def _find_out(self, membership: Membership, portions: Sequence[_Portion]) -> Outcome:
        """Whether a transaction was committed whose answer was lost: if it was, its offsets were."""
        delays = backoff(1.0)
        while not self._closing:
            witness = next((each for each in portions if each.releasable.offsets and not each.ledger.revoked), None)
            if witness is None:
                break
            try:
                if self._transactions.recover():
                    committed = membership.committed(witness.partition)
                    if not witness.ledger.revoked:  # only this member can have moved it
                        found = committed is not None and committed >= witness.releasable.committable
                        return Outcome.COMMITTED if found else Outcome.ABORTED
            except Exception as error:  # noqa: BLE001 - kafka-python raises more than its own errors
                log.warning("the committed offsets are not known: %s: %s", type(error).__name__, error)
            with self._changed:
                self._changed.wait_for(lambda: self._closing, next(delays))
        return Outcome.ABORTED

    def _dismiss(self) -> None:
        """Tell whoever waits for a partition that is gone."""
        with self._lock:
            gone = [place for place in self._settling if place.ledger.revoked]
        self._tell(gone, NotOwned("revoked"))

    def _tell(self, places: Sequence[Place], error: Exception | None = None) -> None:
        with self._lock:
            futures = [future for place in places if (future := self._settling.pop(place, None)) is not None]
        try:
            self._loop.call_soon_threadsafe(_end, futures, error)
        except RuntimeError:  # the loop is gone; so is whoever waited
            return


def _end(futures: Sequence["asyncio.Future[None]"], error: Exception | None) -> None:
    for future in futures:
        if future.done():  # its waiter was cancelled
            continue
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

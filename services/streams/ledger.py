"""Offset bookkeeping for one partition: completions in any order become the offset that may be committed.

Pure: no clock, no thread, no Kafka. The states of an offset:

    (unseen) ── receive ──► held ── finish ──► done ── commit ──► committed
        └───── never: a gap (a compacted record, a transaction's marker) ─────┘

- *held*: received, its outputs are not all acknowledged.
- *done*: its outputs are acknowledged, but an older offset is held, or the commit has not happened yet.
- *committed*: below the group's committed offset; forgotten here.
- A *gap* is never received. It is passed over as soon as nothing older is held.

A partition that is revoked takes its ledger with it: messages keep the ledger that they were received with, and a
ledger that is `revoked` refuses everything. When the partition comes back it gets a new ledger.
"""

from enum import Enum
from typing import Final


class Finish(Enum):
    """What finishing an offset did."""

    ADVANCED = "advanced"
    """The committable offset moved."""
    WAITING = "waiting"
    """Done, but an older offset is held."""
    NOT_HELD = "not_held"
    """Never received here, or finished before."""
    REVOKED = "revoked"
    """The partition belongs to another member by now."""


class Ledger:
    """The offsets of one partition for as long as this member owns it. Not thread-safe."""

    def __init__(self, window: int) -> None:
        """`window` bounds the offsets kept track of, held and done ones together."""
        if window < 1:
            raise ValueError("window must be at least 1")
        self.window: Final = window
        self.revoked = False
        """True once the partition went to another member."""
        self._held: dict[int, None] = {}
        """Ascending, because offsets are received so: the first key is the oldest held one."""
        self._done: set[int] = set()
        """Finished above an older held offset."""
        self._position: int | None = None
        self._committed: int | None = None

    @property
    def position(self) -> int | None:
        """The offset after the last one received or passed over; None before the first."""
        return self._position

    @property
    def held(self) -> int:
        """How many offsets are held."""
        return len(self._held)

    @property
    def room(self) -> int:
        """How many more offsets may be received now."""
        return 0 if self.revoked else self.window - len(self._held) - len(self._done)

    @property
    def oldest_unfinished(self) -> int | None:
        """The held offset that everything else waits for; None when nothing is held."""
        return next(iter(self._held), None)

    @property
    def waiting(self) -> int:
        """How many done offsets wait for the oldest unfinished one."""
        return len(self._done)

    def holds(self, offset: int) -> bool:
        """Whether `offset` is held."""
        return offset in self._held

    @property
    def committable(self) -> int | None:
        """The offset to commit (the next one to read), or None when there is nothing new to commit."""
        if self.revoked:
            return None
        oldest = self.oldest_unfinished
        offset = self._position if oldest is None else oldest
        return None if offset is None or offset == self._committed else offset

    def receive(self, offset: int) -> None:
        """Hold `offset`.

        Raises:
            ValueError: it is not above every offset received before, the window is full, or the ledger is revoked.
        """
        if self._position is not None and offset < self._position:
            raise ValueError(f"offset {offset} is below the position {self._position}")
        if self.room < 1:
            raise ValueError("no room: the window is full or the partition was revoked")
        if self._position is None:
            self._committed = offset  # committing the first offset itself would say nothing new
        self._held[offset] = None
        self._position = offset + 1

    def pass_over(self, position: int) -> None:
        """Say that no offset from the present position up to (not including) `position` will ever be received."""
        if not self.revoked and (self._position is None or position > self._position):
            self._position = position

    def finish(self, offset: int) -> Finish:
        """Mark a held offset as done."""
        if self.revoked:
            return Finish.REVOKED
        if offset not in self._held:
            return Finish.NOT_HELD
        oldest = self.oldest_unfinished
        del self._held[offset]
        if offset != oldest:
            self._done.add(offset)
            return Finish.WAITING
        if self._done:
            oldest = self.oldest_unfinished
            self._done = {done for done in self._done if done > oldest} if oldest is not None else set()
        return Finish.ADVANCED

    def commit(self, offset: int) -> None:
        """Remember that `offset` is committed; an older one than before is ignored."""
        if self._committed is None or offset > self._committed:
            self._committed = offset

    def revoke(self) -> None:
        """Give the partition up: nothing can be received, finished or committed any more."""
        self.revoked = True
        self._held.clear()
        self._done.clear()

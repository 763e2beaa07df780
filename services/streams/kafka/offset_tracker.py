"""Offset bookkeeping for one partition: completions in any order become the offset that may be committed.

Pure: no clock, no thread, no Kafka. The states of an offset:

    (unseen) ── receive ──► held ── finish ──► done ────► released ── record_commit ──► committed
        │                    ▲                  │
        │                    └──── abandon ─────┘
        └───── never: a gap (a compacted record, a transaction's marker) ─────┘

- *held*: received and not finished.
- *done*: finished. `finish` releases it when no older offset is held. In a tracker that keeps outputs (exactly-once
  delivery), `record_transaction` releases it after one transaction has published its outputs and committed the offset.
- *released*: the tracker has forgotten the offset. Only the offset to commit remains.
- A *gap* is never received. It is skipped when no older offset is held or done.

Each assignment of a partition has its own tracker. A message keeps the tracker that it was received with. After the
revocation of the partition that tracker is `revoked` and changes nothing any more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import islice, takewhile
from typing import Final

from services.streams.base import OutgoingMessage

HEAD_OF_LINE_SHARE: Final = 0.9
"""A held offset is at the head of the line when done offsets after it fill this share of the window."""


class FinishResult(Enum):
    """The result of finishing an offset."""

    DONE = "done"
    """The offset was held and is done now."""
    NOT_HELD = "not_held"
    """The offset was never received, or was finished before."""
    REVOKED = "revoked"
    """The partition belongs to another member now."""


@dataclass(frozen=True, slots=True)
class CommittableBatch:
    """The done offsets of a partition that are older than every held offset."""

    offsets: tuple[int, ...]
    """Ascending. Empty when there is only a gap to skip."""
    outputs: tuple[OutgoingMessage, ...]
    """The outputs of all the offsets, in their order."""
    committable: int
    """The offset to commit with them (the next one to read)."""


class OffsetTracker:
    """The offsets of one partition for as long as this member owns it. Not thread-safe."""

    def __init__(self, window: int, *, keeps_outputs: bool = False) -> None:
        """`window` limits the offsets in the tracker, held and done ones together.

        With `keeps_outputs` a done offset stays, with its outputs, until `record_transaction`.
        """
        if window < 1:
            raise ValueError("window must be at least 1")
        self.window: Final = window
        self.revoked = False
        """Whether the partition was revoked."""
        self._keeps_outputs = keeps_outputs
        self._kept: dict[int, tuple[OutgoingMessage, ...] | None] = {}
        """Ascending, because offsets are received so. None for a held offset, the outputs of a done one."""
        self._held = 0
        self._position: int | None = None
        self._committed: int | None = None

    @property
    def position(self) -> int | None:
        """The offset after the last one received or passed over; None before the first."""
        return self._position

    @property
    def held_count(self) -> int:
        """How many offsets are held."""
        return self._held

    @property
    def room(self) -> int:
        """How many more offsets may be received now."""
        return 0 if self.revoked else self.window - len(self._kept)

    @property
    def oldest_unfinished(self) -> int | None:
        """The oldest held offset; None when none is held."""
        return next((offset for offset, outputs in self._kept.items() if outputs is None), None)

    @property
    def waiting(self) -> int:
        """How many done offsets wait for the oldest unfinished one."""
        return len(self._kept) - self._held - len(self._done())

    @property
    def head_of_line_offset(self) -> int | None:
        """The held offset that nearly all of the window waits for, see `HEAD_OF_LINE_SHARE`; None if there is none."""
        return self.oldest_unfinished if self.waiting >= HEAD_OF_LINE_SHARE * self.window else None

    def holds(self, offset: int) -> bool:
        """Whether `offset` is held."""
        return self._kept.get(offset, ()) is None

    @property
    def committable(self) -> int | None:
        """The offset to commit (the next one to read); None when there is nothing new to commit."""
        if self.revoked:
            return None
        offset = next(iter(self._kept), self._position)
        return None if offset is None or offset == self._committed else offset

    def receive(self, offset: int) -> None:
        """Hold `offset`.

        Raises:
            ValueError: it is not above every offset received before, the window is full, or the tracker is revoked.
        """
        if self._position is not None and offset < self._position:
            raise ValueError(f"offset {offset} is below the position {self._position}")
        if self.room < 1:
            raise ValueError("no room: the window is full or the partition was revoked")
        if self._position is None:
            self._committed = offset  # committing the first offset itself would say nothing new
        self._kept[offset] = None
        self._held += 1
        self._position = offset + 1

    def skip(self, position: int) -> None:
        """Mark the offsets up to `position` (exclusive) as gaps."""
        if not self.revoked and (self._position is None or position > self._position):
            self._position = position

    def finish(self, offset: int, outputs: Sequence[OutgoingMessage] = ()) -> FinishResult:
        """Mark a held offset as done. Only a tracker that keeps outputs uses `outputs`."""
        if self.revoked:
            return FinishResult.REVOKED
        if not self.holds(offset):
            return FinishResult.NOT_HELD
        self._kept[offset] = tuple(outputs)
        self._held -= 1
        if not self._keeps_outputs:
            for each in self._done():
                del self._kept[each]
        return FinishResult.DONE

    def next_batch(self, max_offsets: int) -> CommittableBatch | None:
        """Up to `max_offsets` done offsets to publish and commit now; None when there is nothing new."""
        offsets = tuple(self._done(max_offsets))
        committable = next(islice(self._kept, len(offsets), None), self._position)
        if self.revoked or committable is None or committable == self._committed:
            return None
        outputs = tuple(record for offset in offsets for record in self._kept[offset] or ())
        return CommittableBatch(offsets, outputs, committable)

    def record_transaction(self, released: CommittableBatch) -> None:
        """Remember that a transaction has published and committed a batch. A revoked tracker ignores it."""
        if self.revoked:
            return
        for offset in released.offsets:
            del self._kept[offset]
        self.record_commit(released.committable)

    def abandon(self, offset: int) -> None:
        """Hold a done offset again, because its outputs cannot be published. A revoked tracker ignores it.

        Raises:
            ValueError: it is not done.
        """
        if self.revoked:
            return
        if self._kept.get(offset) is None:
            raise ValueError(f"offset {offset} is not done")
        self._kept[offset] = None
        self._held += 1

    def record_commit(self, offset: int) -> None:
        """Remember that `offset` is committed; an older one than before is ignored."""
        if self._committed is None or offset > self._committed:
            self._committed = offset

    def revoke(self) -> None:
        """End the tracker with the assignment of the partition."""
        self.revoked = True
        self._kept.clear()
        self._held = 0

    def _done(self, max_offsets: int | None = None) -> list[int]:
        """The done offsets below the oldest held one, up to `max_offsets`."""
        done = takewhile(lambda each: each[1] is not None, self._kept.items())
        return [offset for offset, _ in islice(done, max_offsets)]

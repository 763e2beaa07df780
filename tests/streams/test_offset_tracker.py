"""The tracker against a model that is nothing but sets, and against a log that is published in transactions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.streams.base import OutgoingMessage
from services.streams.kafka.offset_tracker import CommittableBatch, FinishResult, OffsetTracker

WINDOW = 8


class LedgerMachine(RuleBasedStateMachine):
    """Receives, gaps, completions in any order, commits, and revocation."""

    def __init__(self) -> None:
        super().__init__()
        self.tracker = OffsetTracker(WINDOW)
        self.held: set[int] = set()
        self.finished: set[int] = set()
        self.position: int | None = None
        self.first: int | None = None
        self.committed: int | None = None

    def committable(self) -> int | None:
        """The model: the smallest offset that is held, else the position."""
        return min(self.held) if self.held else self.position

    def tracked(self) -> int:
        return len(self.held) + len([each for each in self.finished if self.held and each > min(self.held)])

    @precondition(lambda self: not self.tracker.revoked and self.tracked() < WINDOW)
    @rule(gap=st.sampled_from([0, 0, 0, 1, 2, 1000]))
    def receive(self, gap: int) -> None:
        offset = (self.position if self.position is not None else 7) + gap
        if self.position is None:
            self.first = self.committed = offset
        self.tracker.receive(offset)
        self.held.add(offset)
        self.position = offset + 1

    @precondition(lambda self: not self.tracker.revoked)
    @rule(gap=st.sampled_from([-3, 0, 1, 5]))
    def skip(self, gap: int) -> None:
        position = max(0, (self.position or 0) + gap)
        self.tracker.skip(position)
        self.position = position if self.position is None else max(self.position, position)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.held)))
        assert self.tracker.holds(offset)
        assert self.tracker.finish(offset) is FinishResult.DONE
        self.held.remove(offset)
        self.finished.add(offset)

    @precondition(lambda self: self.finished)
    @rule(data=st.data())
    def finish_again(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.finished)))
        assert self.tracker.finish(offset) is (FinishResult.REVOKED if self.tracker.revoked else FinishResult.NOT_HELD)

    @rule()
    def commit(self) -> None:
        offset = self.tracker.committable
        if offset is not None:
            self.tracker.record_commit(offset)
            self.committed = offset

    @precondition(lambda self: self.position is not None)
    @rule()
    def go_back(self) -> None:
        assert self.position is not None
        with pytest.raises(ValueError, match=r"below|no room"):
            self.tracker.receive(self.position - 1)

    @precondition(lambda self: self.tracked() >= WINDOW)
    @rule()
    def overfill(self) -> None:
        assert self.position is not None
        with pytest.raises(ValueError, match="no room"):
            self.tracker.receive(self.position)

    @precondition(lambda self: len(self.finished) > 5)
    @rule()
    def revoke(self) -> None:
        self.tracker.revoke()
        self.finished |= self.held
        self.held.clear()

    @invariant()
    def agrees(self) -> None:
        if self.tracker.revoked:
            assert self.tracker.committable is None
            assert self.tracker.room == 0
            assert self.tracker.held_count == 0
            return
        expected = self.committable()
        assert self.tracker.committable == (None if expected == self.committed else expected)
        assert self.tracker.oldest_unfinished == min(self.held, default=None)
        assert self.tracker.held_count == len(self.held)
        assert self.tracker.position == self.position
        assert self.tracker.room == WINDOW - self.tracked() >= 0

    @invariant()
    def commits_nothing_unfinished(self) -> None:
        if self.committed is not None and not self.tracker.revoked:
            assert all(offset >= self.committed for offset in self.held)


TestLedger = LedgerMachine.TestCase


class ReleaseMachine(RuleBasedStateMachine):
    """One partition under exactly-once delivery, through the lives of all the members that own it in turn.

    The log has gaps. `published` and `committed` are what the broker keeps: they change together, when a transaction is
    committed, whether or not the member hears of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log: list[int] = []
        self.end = 3
        self.published: list[int] = []
        self.committed: int | None = None
        self.own()

    def own(self) -> None:
        """A member gets the partition: it reads on from the committed offset."""
        self.tracker = OffsetTracker(WINDOW, keeps_outputs=True)
        self.unread = [offset for offset in self.log if offset >= (self.committed or 0)]
        self.held: set[int] = set()
        self.done: set[int] = set()

    @rule(gap=st.sampled_from([0, 0, 0, 1, 7]))
    def append(self, gap: int) -> None:
        self.end += gap
        self.log.append(self.end)
        self.unread.append(self.end)
        self.end += 1

    @precondition(lambda self: self.unread and self.tracker.room)
    @rule()
    def receive(self) -> None:
        offset = self.unread.pop(0)
        self.tracker.receive(offset)
        self.held.add(offset)

    @precondition(lambda self: not self.unread)
    @rule(gap=st.integers(0, 3))
    def skip(self, gap: int) -> None:
        self.end += gap
        self.tracker.skip(self.end)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.held)))
        assert self.tracker.finish(offset, outputs_of(offset)) is FinishResult.DONE
        assert self.tracker.finish(offset, outputs_of(offset)) is FinishResult.NOT_HELD
        self.held.remove(offset)
        self.done.add(offset)

    @rule(limit=st.integers(1, WINDOW), meanwhile=st.sampled_from(["", "", "finish", "receive"]), data=st.data())
    def transact(self, limit: int, meanwhile: str, data: st.DataObject) -> None:
        batch = self.tracker.next_batch(limit)
        if batch is None:
            return
        assert len(batch.offsets) <= limit
        if meanwhile == "finish" and self.held:
            self.finish(data)
        elif meanwhile == "receive" and self.unread and self.tracker.room:
            self.receive()
        self.commit(batch)
        self.tracker.record_transaction(batch)
        self.done -= set(batch.offsets)

    @precondition(lambda self: self.done)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.done)))
        self.tracker.abandon(offset)
        self.done.remove(offset)
        self.held.add(offset)

    @rule(answer_lost=st.booleans())
    def revoke(self, answer_lost: bool) -> None:
        batch = self.tracker.next_batch(WINDOW)
        if answer_lost and batch:
            self.commit(batch)
        self.tracker.revoke()
        if batch:
            self.tracker.record_transaction(batch)
        assert self.tracker.next_batch(WINDOW) is None
        assert all(self.tracker.finish(offset, ()) is FinishResult.REVOKED for offset in self.held)
        self.own()

    def commit(self, batch: CommittableBatch) -> None:
        """The broker's side of a transaction."""
        assert self.committed is None or batch.committable > self.committed or not batch.offsets
        self.published += [int(record.value) for record in batch.outputs]
        self.committed = batch.committable

    @invariant()
    def publishes_the_log_once_and_in_order(self) -> None:
        assert self.published == [each for offset in self.log[: self.settled()] for each in [offset] * (offset % 3)]

    @invariant()
    def agrees(self) -> None:
        assert self.tracker.held_count == len(self.held)
        assert self.tracker.room == WINDOW - len(self.held) - len(self.done) >= 0
        assert self.tracker.oldest_unfinished == min(self.held, default=None)
        waiting = len([offset for offset in self.done if self.held and offset > min(self.held)])
        assert self.tracker.waiting == waiting
        assert self.tracker.head_of_line_offset == (min(self.held) if waiting >= 0.9 * WINDOW else None)

    def settled(self) -> int:
        """How many messages of the log are below the committed offset."""
        return len([offset for offset in self.log if offset < (self.committed or 0)])


def outputs_of(offset: int) -> list[OutgoingMessage]:
    """None, one or two."""
    return [OutgoingMessage("verdicts", str(offset).encode())] * (offset % 3)


TestRelease = ReleaseMachine.TestCase


@given(order=st.permutations(range(20)), gaps=st.lists(st.integers(0, 3), min_size=20, max_size=20))
def test_all_finished_offsets_are_committable(order: list[int], gaps: list[int]) -> None:
    tracker = OffsetTracker(20)
    offsets, at = [], 0
    for gap in gaps:
        at += gap
        offsets.append(at)
        tracker.receive(at)
        at += 1
    for which in order:
        tracker.finish(offsets[which])
    assert tracker.committable == offsets[-1] + 1
    assert tracker.waiting == 0
    assert tracker.room == 20


def test_held_offset_holds_later_ones_back() -> None:
    tracker = OffsetTracker(4)
    for offset in range(4):
        tracker.receive(offset)
    for offset in (1, 2, 3):
        assert tracker.finish(offset) is FinishResult.DONE
    assert (tracker.oldest_unfinished, tracker.waiting, tracker.room, tracker.committable) == (0, 3, 0, None)
    assert tracker.finish(0) is FinishResult.DONE
    assert (tracker.oldest_unfinished, tracker.waiting, tracker.room, tracker.committable) == (None, 0, 4, 4)


def test_empty_window_is_rejected() -> None:
    with pytest.raises(ValueError, match="window"):
        OffsetTracker(0)


def test_older_commit_is_ignored() -> None:
    tracker = OffsetTracker(4)
    tracker.receive(0)
    tracker.finish(0)
    tracker.record_commit(1)
    tracker.record_commit(0)
    assert tracker.committable is None


def test_abandon_of_an_offset_that_is_not_done_raises() -> None:
    tracker = OffsetTracker(4, keeps_outputs=True)
    tracker.receive(0)
    with pytest.raises(ValueError, match="not done"):
        tracker.abandon(0)
    tracker.revoke()
    tracker.abandon(0)
    assert not tracker.holds(0)


@pytest.mark.parametrize("keeps_outputs", [False, True])
def test_head_of_line_offset_is_the_one_that_a_nearly_full_window_waits_for(keeps_outputs: bool) -> None:
    tracker = OffsetTracker(10, keeps_outputs=keeps_outputs)
    for offset in range(10):
        tracker.receive(offset)
    for offset in range(1, 9):
        tracker.finish(offset)
        assert tracker.head_of_line_offset is None
    tracker.finish(9)
    assert tracker.head_of_line_offset == 0
    tracker.finish(0)
    assert tracker.head_of_line_offset is None

"""The ledger against a model that is nothing but sets, and against a log that is published in transactions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.streams.base import Record
from services.streams.kafka.offsets import Finish, Ledger, Releasable

WINDOW = 8


class LedgerMachine(RuleBasedStateMachine):
    """Receives, gaps, completions in any order, commits, and revocation."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(WINDOW)
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

    @precondition(lambda self: not self.ledger.revoked and self.tracked() < WINDOW)
    @rule(gap=st.sampled_from([0, 0, 0, 1, 2, 1000]))
    def receive(self, gap: int) -> None:
        offset = (self.position if self.position is not None else 7) + gap
        if self.position is None:
            self.first = self.committed = offset
        self.ledger.receive(offset)
        self.held.add(offset)
        self.position = offset + 1

    @precondition(lambda self: not self.ledger.revoked)
    @rule(gap=st.sampled_from([-3, 0, 1, 5]))
    def pass_over(self, gap: int) -> None:
        position = max(0, (self.position or 0) + gap)
        self.ledger.pass_over(position)
        self.position = position if self.position is None else max(self.position, position)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.held)))
        oldest = offset == min(self.held)
        assert self.ledger.holds(offset)
        assert self.ledger.finish(offset) is (Finish.ADVANCED if oldest else Finish.WAITING)
        self.held.remove(offset)
        self.finished.add(offset)

    @precondition(lambda self: self.finished)
    @rule(data=st.data())
    def finish_again(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.finished)))
        assert self.ledger.finish(offset) is (Finish.REVOKED if self.ledger.revoked else Finish.NOT_HELD)

    @rule()
    def commit(self) -> None:
        offset = self.ledger.committable
        if offset is not None:
            self.ledger.commit(offset)
            self.committed = offset

    @precondition(lambda self: self.position is not None)
    @rule()
    def go_back(self) -> None:
        assert self.position is not None
        with pytest.raises(ValueError, match=r"below|no room"):
            self.ledger.receive(self.position - 1)

    @precondition(lambda self: self.tracked() >= WINDOW)
    @rule()
    def overfill(self) -> None:
        assert self.position is not None
        with pytest.raises(ValueError, match="no room"):
            self.ledger.receive(self.position)

    @precondition(lambda self: len(self.finished) > 5)
    @rule()
    def revoke(self) -> None:
        self.ledger.revoke()
        self.finished |= self.held
        self.held.clear()

    @invariant()
    def agrees(self) -> None:
        if self.ledger.revoked:
            assert self.ledger.committable is None
            assert self.ledger.room == 0
            assert self.ledger.held == 0
            return
        expected = self.committable()
        assert self.ledger.committable == (None if expected == self.committed else expected)
        assert self.ledger.oldest_unfinished == min(self.held, default=None)
        assert self.ledger.held == len(self.held)
        assert self.ledger.position == self.position
        assert self.ledger.room == WINDOW - self.tracked() >= 0

    @invariant()
    def commits_nothing_unfinished(self) -> None:
        if self.committed is not None and not self.ledger.revoked:
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
        self.ledger = Ledger(WINDOW, keeps_outputs=True)
        self.unread = [offset for offset in self.log if offset >= (self.committed or 0)]
        self.held: set[int] = set()
        self.done: set[int] = set()

    @rule(gap=st.sampled_from([0, 0, 0, 1, 7]))
    def append(self, gap: int) -> None:
        self.end += gap
        self.log.append(self.end)
        self.unread.append(self.end)
        self.end += 1

    @precondition(lambda self: self.unread and self.ledger.room)
    @rule()
    def receive(self) -> None:
        offset = self.unread.pop(0)
        self.ledger.receive(offset)
        self.held.add(offset)

    @precondition(lambda self: not self.unread)
    @rule(gap=st.integers(0, 3))
    def pass_over(self, gap: int) -> None:
        self.end += gap
        self.ledger.pass_over(self.end)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.held)))
        assert self.ledger.finish(offset, outputs_of(offset)) is Finish.WAITING
        assert self.ledger.finish(offset, outputs_of(offset)) is Finish.NOT_HELD
        self.held.remove(offset)
        self.done.add(offset)

    @rule(limit=st.integers(1, WINDOW), meanwhile=st.sampled_from(["", "", "finish", "receive"]), data=st.data())
    def transact(self, limit: int, meanwhile: str, data: st.DataObject) -> None:
        releasable = self.ledger.releasable(limit)
        if releasable is None:
            return
        assert len(releasable.offsets) <= limit
        if meanwhile == "finish" and self.held:
            self.finish(data)
        elif meanwhile == "receive" and self.unread and self.ledger.room:
            self.receive()
        self.commit(releasable)
        self.ledger.release(releasable)
        self.done -= set(releasable.offsets)

    @precondition(lambda self: self.done)
    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.done)))
        self.ledger.refuse(offset)
        self.done.remove(offset)
        self.held.add(offset)

    @rule(answer_lost=st.booleans())
    def revoke(self, answer_lost: bool) -> None:
        releasable = self.ledger.releasable(WINDOW)
        if answer_lost and releasable:
            self.commit(releasable)
        self.ledger.revoke()
        if releasable:
            self.ledger.release(releasable)
        assert self.ledger.releasable(WINDOW) is None
        assert all(self.ledger.finish(offset, ()) is Finish.REVOKED for offset in self.held)
        self.own()

    def commit(self, releasable: Releasable) -> None:
        """The broker's side of a transaction."""
        assert self.committed is None or releasable.committable > self.committed or not releasable.offsets
        self.published += [int(record.value) for record in releasable.outputs]
        self.committed = releasable.committable

    @invariant()
    def publishes_the_log_once_and_in_order(self) -> None:
        assert self.published == [each for offset in self.log[: self.settled()] for each in [offset] * (offset % 3)]

    @invariant()
    def agrees(self) -> None:
        assert self.ledger.held == len(self.held)
        assert self.ledger.room == WINDOW - len(self.held) - len(self.done) >= 0
        assert self.ledger.oldest_unfinished == min(self.held, default=None)
        waiting = len([offset for offset in self.done if self.held and offset > min(self.held)])
        assert self.ledger.waiting == waiting
        assert self.ledger.blocked_by == (min(self.held) if waiting >= 0.9 * WINDOW else None)

    def settled(self) -> int:
        """How many messages of the log are below the committed offset."""
        return len([offset for offset in self.log if offset < (self.committed or 0)])


def outputs_of(offset: int) -> list[Record]:
    """None, one or two."""
    return [Record("verdicts", str(offset).encode())] * (offset % 3)


TestRelease = ReleaseMachine.TestCase


@given(order=st.permutations(range(20)), gaps=st.lists(st.integers(0, 3), min_size=20, max_size=20))
def test_in_the_end_everything_may_be_committed(order: list[int], gaps: list[int]) -> None:
    ledger = Ledger(20)
    offsets, at = [], 0
    for gap in gaps:
        at += gap
        offsets.append(at)
        ledger.receive(at)
        at += 1
    for which in order:
        ledger.finish(offsets[which])
    assert ledger.committable == offsets[-1] + 1
    assert ledger.waiting == 0
    assert ledger.room == 20


def test_one_stuck_offset_holds_the_rest_back() -> None:
    ledger = Ledger(4)
    for offset in range(4):
        ledger.receive(offset)
    for offset in (1, 2, 3):
        assert ledger.finish(offset) is Finish.WAITING
    assert (ledger.oldest_unfinished, ledger.waiting, ledger.room, ledger.committable) == (0, 3, 0, None)
    assert ledger.finish(0) is Finish.ADVANCED
    assert (ledger.oldest_unfinished, ledger.waiting, ledger.room, ledger.committable) == (None, 0, 4, 4)


def test_a_window_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="window"):
        Ledger(0)


def test_an_older_commit_changes_nothing() -> None:
    ledger = Ledger(4)
    ledger.receive(0)
    ledger.finish(0)
    ledger.commit(1)
    ledger.commit(0)
    assert ledger.committable is None


def test_only_a_done_offset_can_be_refused() -> None:
    ledger = Ledger(4, keeps_outputs=True)
    ledger.receive(0)
    with pytest.raises(ValueError, match="not done"):
        ledger.refuse(0)
    ledger.revoke()
    ledger.refuse(0)
    assert not ledger.holds(0)


@pytest.mark.parametrize("keeps_outputs", [False, True])
def test_the_offset_that_blocks_a_window(keeps_outputs: bool) -> None:
    ledger = Ledger(10, keeps_outputs=keeps_outputs)
    for offset in range(10):
        ledger.receive(offset)
    for offset in range(1, 9):
        ledger.finish(offset)
        assert ledger.blocked_by is None
    ledger.finish(9)
    assert ledger.blocked_by == 0
    ledger.finish(0)
    assert ledger.blocked_by is None

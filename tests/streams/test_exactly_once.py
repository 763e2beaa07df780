"""Exactly-once delivery: outputs are published once although processes are killed, for readers of committed records."""

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kafka
import pytest
from kafka.coordinator.base import Generation

from services.core.errors import NotOwned
from services.streams.config import StreamConfig
from services.streams.kafka.compat import FixedCooperativeStickyAssignor
from services.streams.kafka.exactly_once import TransactionalCommitter
from services.streams.kafka.transactions import CommitOutcome, TransactionalSender
from tests.streams.fleet import Fleet
from tests.streams.worker import MOMENTS
from tests.support.kafka_broker import Broker
from tests.support.streams_bench import PATIENT, Streams, collect, eventually

pytestmark = pytest.mark.kafka


@pytest.fixture
async def streams(kafka_address: str) -> AsyncIterator[Streams]:
    streams = Streams("kafka exactly once", f"kafka://{kafka_address}")
    yield streams
    await streams.close()


async def test_outputs_are_published_once_when_members_and_broker_are_killed(
    tmp_path: Path, outage_broker: Broker
) -> None:
    broker = outage_broker
    if not broker.is_running:
        await asyncio.to_thread(broker.start)
    streams = Streams("kafka exactly once", f"kafka://{broker.address}")
    fleet = Fleet(streams, tmp_path)
    chance = random.Random(20261121)
    try:
        await fleet.submit(600)
        for name, moment in zip("abc", MOMENTS, strict=True):
            fleet.start(name, moment, chance.randrange(1, 4), dynamic=name == "b")
        for name in "abc":
            await fleet.died(name)
            fleet.start(name, dynamic=name == "b")
        await fleet.submit(600)
        await fleet.settled(chance.uniform(0.5, 0.8))
        broker.kill()
        await asyncio.sleep(chance.uniform(0, 0.5))
        await asyncio.to_thread(broker.start)
        fleet.start("d")
        await fleet.submit(600)
        await fleet.settled(chance.uniform(0.7, 0.9))
        await asyncio.to_thread(fleet.stop, "a")
        fleet.kill("c")
        await fleet.submit(200)
        fleet.start("c")
        await fleet.settled()

        await fleet.check()
        verdicts, _ = await fleet.outputs()
        for key in {each.key for each in verdicts}:  # in the order of the submissions
            numbers = [int(each.value) for each in verdicts if each.key == key]
            assert numbers == sorted(numbers)
    finally:
        fleet.end()


@pytest.mark.parametrize("lost", ["request", "answer"])
async def test_commit_with_unknown_outcome_publishes_once(
    streams: Streams, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transaction is committed or it is not; either way its outputs are there once."""
    member: Any = await streams.member(**PATIENT)
    await streams.submit("a", "b", "c")
    a, b, c = await collect(member, 3)
    await member.settle(a, [streams.verdict("a")])
    answered: Any = TransactionalSender._wait_for_result
    failures: list[str] = []

    def fail_once(self: Any, result: Any) -> None:
        if self._producer._transaction_manager.is_completing() and not failures:
            failures.append(lost)
            if lost == "request":
                self._producer._sender.force_close()
            else:
                answered(self, result)
            raise TimeoutError("no answer")
        answered(self, result)

    monkeypatch.setattr(TransactionalSender, "_wait_for_result", fail_once)
    await asyncio.gather(*(member.settle(each, [streams.verdict(each.value.decode())]) for each in (b, c)))
    assert failures == [lost]
    assert await streams.verdicts() == ["a", "b", "c"]


async def test_offsets_of_an_aborted_transaction_are_forgotten(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kafka-python alone would send them with the next one, for a partition that another member may own by then."""
    # The member itself must commit nothing: it would commit offset 0 of an empty partition.
    monkeypatch.setattr(TransactionalCommitter, "start", lambda *_: None)
    member: Any = await streams.member(**PATIENT)
    await streams.submit("a")
    await collect(member, 1)
    transactions = await asyncio.to_thread(
        TransactionalSender, StreamConfig.from_settings(streams.settings()), f"{streams.name}/other"
    )
    one, two = (kafka.TopicPartition(streams.settings().submissions_stream, each) for each in (1, 2))
    group = member.get_group_metadata()
    stale = group._replace(generation_id=group.generation_id + 1)
    publish = transactions.publish
    record = streams.verdict("v")
    outcome, words = await asyncio.to_thread(publish, [record], {one: 5}, lambda: stale)
    assert (outcome, "IllegalGeneration" in words) == (CommitOutcome.ABORTED, True)
    outcome, _ = await asyncio.to_thread(publish, [record], {two: 7}, lambda: group)
    assert outcome is CommitOutcome.COMMITTED
    outcome, _ = await asyncio.to_thread(publish, [record], {one: 9}, lambda: None)
    assert outcome is CommitOutcome.ABORTED
    outcome, _ = await asyncio.to_thread(publish, [record], {two: 8}, lambda: group)
    assert outcome is CommitOutcome.COMMITTED
    committed = await asyncio.to_thread(lambda: [member.fetch_committed(each) for each in (one, two)])
    assert committed == [None, 8]
    assert await streams.verdicts() == ["v", "v"]
    await asyncio.to_thread(transactions.close)


async def test_fenced_producer_publishes_nothing(streams: Streams) -> None:
    settings = streams.settings()
    earlier, later = [
        await asyncio.to_thread(TransactionalSender, StreamConfig.from_settings(settings), f"{streams.name}/same")
        for _ in range(2)
    ]
    member: Any = await streams.member(**PATIENT)
    await streams.submit("a")
    await collect(member, 1)
    partition = kafka.TopicPartition(settings.submissions_stream, 0)
    outcome, _ = await asyncio.to_thread(
        earlier.publish, [streams.verdict("a")], {partition: 1}, member.get_group_metadata
    )
    assert outcome is CommitOutcome.ABORTED
    assert await streams.verdicts() == []
    for each in (earlier, later):
        await asyncio.to_thread(each.close)


async def test_outputs_behind_a_held_message_are_published_after_it(streams: Streams) -> None:
    member = await streams.member()
    await streams.submit(*"abcd")
    received = await collect(member, 4)
    later = [
        asyncio.create_task(member.settle(each, [streams.verdict(each.value.decode())])) for each in received[:0:-1]
    ]
    await asyncio.sleep(0.5)
    assert not any(task.done() for task in later)
    assert await streams.verdicts() == []
    await member.settle(received[0], [streams.verdict("a")])
    await asyncio.gather(*later)
    published = await streams.everything(streams.settings().verdicts_stream)
    assert [each.value for each in published] == [b"a", b"b", b"c", b"d"]


async def test_cancelled_settle_is_committed(streams: Streams) -> None:
    member = await streams.member()
    await streams.submit("a", "b")
    a, b = await collect(member, 2)
    settling = asyncio.create_task(member.settle(b, [streams.verdict("b")]))
    await asyncio.sleep(0.05)
    settling.cancel()
    await member.settle(a, [streams.verdict("a")])

    async def both() -> bool:
        return await streams.verdicts() == ["a", "b"]

    await eventually(both)
    with pytest.raises(NotOwned):
        await member.settle(b, [streams.verdict("b")])


@pytest.mark.parametrize("while_joining", [False, True])
async def test_messages_held_before_a_lost_membership_are_not_owned(streams: Streams, while_joining: bool) -> None:
    """kafka-python alone would keep it, and claim it, when that happens while the member is joining anyway."""
    member: Any = await streams.member(**PATIENT)
    await streams.submit("a", "b")
    held = await collect(member, 2)
    coordinator = member._consumer._coordinator
    coordinator.rejoining = while_joining
    coordinator.reset_generation()
    again = await collect(member, 2)
    assert [each.source for each in again] == [each.source for each in held]
    with pytest.raises(NotOwned):
        await member.settle(held[0], [streams.verdict("stale")])
    for message in again:
        await member.settle(message, [streams.verdict(message.value.decode())])
    assert await streams.verdicts() == ["a", "b"]


def test_lost_partitions_are_not_claimed() -> None:
    """The leader would give it to two members in the same generation."""
    partition = kafka.TopicPartition("submissions", 1)
    given_up: list[Any] = []
    assignor = FixedCooperativeStickyAssignor()
    assignor.member_assignment = [partition]
    assignor.consumer = SimpleNamespace(
        _coordinator=SimpleNamespace(_generation=Generation(7, "me", "cooperative-sticky")),
        _subscription=SimpleNamespace(assign_from_subscribed=given_up.append),
        assignment=lambda: {partition},
    )
    assignor.on_lost = given_up.append
    assert [each.partitions for each in assignor.metadata(["submissions"]).owned_partitions] == [[1]]
    assert given_up == []
    assignor.consumer._coordinator._generation = Generation.NO_GENERATION
    assert assignor.metadata(["submissions"]).owned_partitions == []
    assert given_up == [[], {partition}]

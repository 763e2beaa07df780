"""The promises of every stream system: in memory, on Redis Streams and, with both deliveries, on Kafka."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from services.core.errors import NotOwned, StreamUnavailable
from services.streams.base import GroupConsumer, Message, OutgoingMessage
from tests.support.kafka_broker import Broker
from tests.support.servers import Valkey
from tests.support.streams_bench import KINDS, PATIENT, Streams, collect, eventually, reach, settle_in_order, values


async def test_message_arrives_unchanged(streams: Streams) -> None:
    stream = streams.settings().submissions_stream
    records = [
        OutgoingMessage(stream, b"plain", b"key"),
        OutgoingMessage(stream, b"no key"),
        OutgoingMessage(stream, b"", b"empty value"),
        OutgoingMessage(stream, bytes(range(256)), bytes(range(255, -1, -1))),
        OutgoingMessage(
            stream, b"headers", b"k", (("ce_id", b"1"), ("ce_id", b"2"), ("größe", "größer".encode()), ("e", b""))
        ),
    ]
    await streams.publish(*records)
    received = await collect(await streams.member(), len(records))
    assert sorted((each.value, each.key or b"", each.headers) for each in received) == sorted(
        (each.value, each.key or b"", each.headers) for each in records
    )
    assert [each.key for each in received if each.value == b"no key"] == [None]
    assert next(each for each in received if each.value == b"headers").header("CE_ID") == b"2"
    for message in received:
        assert message.source.startswith(f"{stream}/")
        assert message.attempts == 1
        assert abs(message.timestamp - datetime.now(UTC)) < timedelta(minutes=1)


async def test_messages_of_one_key_arrive_in_order(streams: Streams) -> None:
    numbers = [str(number) for number in range(300)]
    await streams.submit(*numbers)
    assert values(await collect(await streams.member(), 300)) == numbers


async def test_settle_publishes_outputs_unchanged(streams: Streams) -> None:
    settings = streams.settings()
    await streams.submit("a")
    member = await streams.member()
    (message,) = await collect(member, 1)
    verdict = OutgoingMessage(settings.verdicts_stream, b"verdict", b"key", (("n", b"1"), ("ü", b"\xff")))
    dead = OutgoingMessage(settings.dead_letters_stream, message.value, None, ())
    await member.settle(message, [verdict, dead])
    (published,) = await streams.everything(settings.verdicts_stream)
    assert (published.value, published.key, published.headers) == (b"verdict", b"key", (("n", b"1"), ("ü", b"\xff")))
    (letter,) = await streams.everything(settings.dead_letters_stream)
    assert (letter.value, letter.key) == (b"a", None)


async def test_messages_settled_out_of_order_are_not_redelivered(streams: Streams) -> None:
    await streams.submit(*"abcdef")
    first = await streams.member()
    received = await collect(first, 6)
    out_of_order = [received[at] for at in (5, 0, 3, 1, 4, 2)]
    await settle_in_order(first, *((each, [streams.verdict(each.value.decode())]) for each in out_of_order))
    await first.close()
    second = await streams.member()
    await streams.submit("g")
    assert values(await collect(second, 1)) == ["g"]
    assert await second.receive(10, 0.5) == []
    assert await streams.verdicts() == list("abcdef")


async def test_settle_without_outputs_acknowledges(streams: Streams) -> None:
    await streams.submit("ignored")
    member = await streams.member()
    (message,) = await collect(member, 1)
    await member.settle(message, [])
    assert await streams.verdicts() == []

    async def nothing_waits() -> bool:
        return (await member.lag()).total == 0

    await eventually(nothing_waits)


async def test_second_settle_raises_not_owned(streams: Streams) -> None:
    await streams.submit("a")
    member = await streams.member()
    (message,) = await collect(member, 1)
    await member.settle(message, [streams.verdict("a")])
    with pytest.raises(NotOwned):
        await member.settle(message, [streams.verdict("a")])
    assert await streams.verdicts() == ["a"]


async def test_messages_of_a_killed_member_go_to_another(streams: Streams, tmp_path: Path) -> None:
    await streams.submit("a", "b")
    await streams.kill_member_holding(2, tmp_path)
    survivor = await streams.member("survivor")
    received = await collect(survivor, 2)
    assert values(received) == ["a", "b"]
    for message in received:
        await survivor.settle(message, [streams.verdict(message.value.decode())])
    assert await streams.verdicts() == ["a", "b"]


async def test_settle_of_a_message_owned_by_another_member_publishes_nothing(streams: Streams) -> None:
    await streams.submit(*(f"m{number}" for number in range(12)), key=None)
    for number in range(12):  # one key each, so that every Kafka partition has some
        await streams.submit(f"k{number}", key=str(number).encode())
    slow = await streams.member("slow", **PATIENT)
    held = {message.value: message for message in await collect(slow, 24)}
    quick = await streams.member("quick", redis_claim_idle_s=0.2)
    (taken,) = await collect(quick, 1)
    with pytest.raises(NotOwned):
        await slow.settle(held[taken.value], [streams.verdict("slow")])
    assert await streams.verdicts() == []
    await quick.settle(taken, [streams.verdict("quick")])
    assert await streams.verdicts() == ["quick"]


async def test_lag_counts_unsettled_messages(streams: Streams) -> None:
    member = await streams.member()

    async def none_waits() -> bool:
        # A broker that has just started has no coordinator for the group yet.
        with contextlib.suppress(StreamUnavailable):
            return (await member.lag()).total == 0
        return False

    await eventually(none_waits)
    await streams.submit(*"abcde")
    received = await collect(member, 3)
    assert (await member.lag()).total == 5
    for message in received[:2]:
        await member.settle(message, [streams.verdict("v")])

    async def three_wait() -> bool:
        return (await member.lag()).total == 3

    await eventually(three_wait)
    lag = await member.lag()
    assert lag.total == sum(lag.by_partition.values())
    assert lag.published == 5  # settled or not
    assert (lag.partitions, lag.owned_partitions) == ((3, {0, 1, 2}) if streams.url.startswith("kafka") else (0, set()))


async def test_receive_respects_limit_and_timeout(streams: Streams) -> None:
    member = await streams.member()
    began = time.monotonic()
    assert await asyncio.wait_for(member.receive(10, 0.3), 30) == []
    assert time.monotonic() - began > 0.2
    await streams.submit(*"abcde")
    assert len(await collect(member, 2)) == 2
    assert len(await member.receive(2, 5)) == 2
    assert len(await member.receive(2, 5)) == 1


async def test_two_members_share_the_work(streams: Streams) -> None:
    members = [await streams.member("one"), await streams.member("two")]
    counts = [0, 0]
    done = asyncio.Event()

    async def work(which: int) -> None:
        while not done.is_set():
            for message in await members[which].receive(1, 0.2):
                counts[which] += 1
                try:
                    await members[which].settle(message, [streams.verdict(message.value.decode())])
                except NotOwned:
                    continue

    workers = [asyncio.create_task(work(which)) for which in (0, 1)]
    submitted: list[str] = []

    async def both_worked() -> bool:
        for key in range(6):
            submitted.append(f"{len(submitted)}")
            await streams.submit(submitted[-1], key=str(key).encode())
        return all(counts)

    async def judged() -> int:
        return len(set(await streams.verdicts()))

    try:
        await eventually(both_worked)
        await reach(len(submitted), judged)
        assert set(await streams.verdicts()) == set(submitted)
    finally:
        done.set()
        await asyncio.gather(*workers)


async def test_close_hands_held_messages_over_at_once(streams: Streams) -> None:
    await streams.submit(*"abcdef")
    leaving = await streams.member("leaving", **PATIENT)
    held = await collect(leaving, 6)
    for message in held[:2]:
        await leaving.settle(message, [streams.verdict(message.value.decode())])
    await leaving.close()
    heir = await streams.member("heir", **PATIENT)
    assert values(await collect(heir, 4, within_s=10)) == list("cdef")
    with pytest.raises(NotOwned):
        await leaving.settle(held[2], [streams.verdict("late")])
    assert await streams.verdicts() == ["a", "b"]


async def test_slow_member_keeps_its_message(streams: Streams) -> None:
    short: dict[str, Any] = {"redis_claim_idle_s": 0.6, "max_poll_interval_ms": 2_000}
    members = [await streams.member(name, **short) for name in ("one", "two")]
    await _let_both_work(streams, members)
    await streams.submit("slow")
    received: list[Sequence[Message]] = []

    async def arrived() -> bool:
        received[:] = await asyncio.gather(*(member.receive(1, 0.2) for member in members))
        return any(received)

    await eventually(arrived)
    owner = 0 if received[0] else 1
    assert await members[1 - owner].receive(1, 3.0) == []  # longer than the claim time, and than the poll interval
    await members[owner].settle(received[owner][0], [streams.verdict("slow")])
    assert await streams.verdicts() == ["slow"]


async def _let_both_work(streams: Streams, members: Sequence[GroupConsumer]) -> None:
    """Returns when every member has its share of the stream and nothing is left on it."""
    counts = [0, 0]

    async def both_worked() -> bool:
        for key in range(6):
            await streams.submit("probe", key=str(key).encode())
        for which, member in enumerate(members):
            for message in await member.receive(3, 0.2):
                with contextlib.suppress(NotOwned):  # the shares may still change
                    await member.settle(message, [])
                counts[which] += 1
        return all(counts)

    async def drained() -> bool:
        for member in members:
            for message in await member.receive(100, 0.2):
                with contextlib.suppress(NotOwned):
                    await member.settle(message, [])
        return (await members[0].lag()).total == 0

    await eventually(both_worked)
    await eventually(drained)


async def test_settle_and_receive_wait_for_the_end_of_an_outage(served: tuple[Streams, Broker | Valkey]) -> None:
    streams, server = served
    member = await streams.member(**PATIENT)
    await streams.submit("before", "held")
    before, held = await collect(member, 2)
    await member.settle(before, [streams.verdict("before")])
    server.kill()
    settling = asyncio.create_task(member.settle(held, [streams.verdict("held")]))
    assert await member.receive(1, 0.5) == []
    with pytest.raises(StreamUnavailable):
        await member.lag()
    assert not settling.done()
    await asyncio.to_thread(server.start)
    await asyncio.wait_for(settling, 30)
    await streams.submit("after")
    received = await collect(member, 1, within_s=40)
    while received[-1].value != b"after":  # Kafka may deliver the uncommitted ones again
        received += await collect(member, 1)
    await member.settle(received[-1], [streams.verdict("after")])
    published = await streams.verdicts()
    assert (published if streams.delivery == "exactly_once" else sorted(set(published))) == ["after", "before", "held"]


async def test_close_during_an_outage_returns(served: tuple[Streams, Broker | Valkey]) -> None:
    streams, server = served
    member = await streams.member()
    await streams.submit("a")
    (message,) = await collect(member, 1)
    server.kill()
    settling = asyncio.create_task(member.settle(message, [streams.verdict("a")]))
    await asyncio.sleep(0.2)
    await asyncio.wait_for(member.close(), 15)
    with pytest.raises(NotOwned):
        await asyncio.wait_for(settling, 10)


@pytest.mark.parametrize("streams", KINDS, indirect=True)
async def test_read_since_a_time_returns_later_messages(streams: Streams) -> None:
    settings = streams.settings()
    await streams.publish(
        *(OutgoingMessage(settings.verdicts_stream, f"old{number}".encode()) for number in range(250))
    )
    await asyncio.sleep(0.05)
    moment = datetime.now(UTC)
    await asyncio.sleep(0.05)
    await streams.publish(OutgoingMessage(settings.verdicts_stream, b"new", b"k", (("h", b"1"),)))
    assert len(await streams.verdicts()) == 251
    reader = await streams.reader()
    (only,) = [message async for message in reader.read(settings.verdicts_stream, follow=False, since=moment)]
    assert (only.value, only.key, only.headers) == (b"new", b"k", (("h", b"1"),))
    later = datetime.now(UTC) + timedelta(hours=1)
    assert [each async for each in reader.read(settings.verdicts_stream, follow=False, since=later)] == []
    assert [each async for each in reader.read(f"{streams.name}.none", follow=False)] == []
    await reader.close()


@pytest.mark.parametrize("streams", KINDS, indirect=True)
async def test_read_with_follow_returns_new_messages(streams: Streams) -> None:
    settings = streams.settings()
    publisher = await streams.publisher()
    await publisher.publish([OutgoingMessage(settings.verdicts_stream, b"0", b"k")])
    reader = await streams.reader()
    following = reader.read(settings.verdicts_stream, follow=True)
    for number in range(1, 4):
        assert (await asyncio.wait_for(anext(following), 10)).value == str(number - 1).encode()
        await publisher.publish([OutgoingMessage(settings.verdicts_stream, str(number).encode(), b"k")])
    await following.aclose()  # type: ignore[attr-defined]
    await reader.close()
    await publisher.close()

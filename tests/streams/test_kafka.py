"""Features of Kafka only: topics, partitions, sizes, transactions."""

import asyncio
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import kafka
import pytest
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.coordinator.base import Generation
from kafka.errors import KafkaConnectionError
from kafka.structs import MemberState

from services.core.errors import ConfigurationError, NotOwned, StreamUnavailable
from services.core.processes import SupervisedProcess
from services.streams.base import GroupConsumer, Message, OutgoingMessage
from tests.support.streams_bench import PATIENT, Streams, collect, eventually, settle_in_order, values

pytestmark = pytest.mark.kafka


BOTH_DELIVERIES = pytest.mark.parametrize("streams", ["at least once", "exactly once"], indirect=True)


@pytest.fixture
async def streams(kafka_address: str, request: pytest.FixtureRequest) -> AsyncIterator[Streams]:
    streams = Streams(getattr(request, "param", "at least once"), f"kafka://{kafka_address}")
    yield streams
    await streams.close()


async def test_missing_topics_are_created(streams: Streams, kafka_address: str) -> None:
    settings = streams.settings(kafka_partitions=5)
    await streams.member(kafka_partitions=5)

    def look() -> tuple[dict[str, int], str]:
        admin = kafka.KafkaAdminClient(bootstrap_servers=kafka_address)
        try:
            names = [settings.submissions_stream, settings.verdicts_stream, settings.dead_letters_stream]
            partitions = {topic["name"]: len(topic["partitions"]) for topic in admin.describe_topics(names)}
            resource = ConfigResource(ConfigResourceType.TOPIC, settings.dead_letters_stream)
            return partitions, repr(admin.describe_configs([resource]))
        finally:
            admin.close()

    partitions, configs = await asyncio.to_thread(look)
    assert set(partitions.values()) == {5}
    assert str(2 << 20) in configs


async def test_largest_message_fits_into_a_dead_letter(streams: Streams) -> None:
    member = await streams.member()
    original = os.urandom((1 << 20) - 200)  # as large as the broker takes, and no compression helps
    await streams.publish(OutgoingMessage(streams.settings().submissions_stream, original, b"key"))
    (message,) = await collect(member, 1)
    headers = (("sluice-detail", b"x" * 1000),)
    await member.settle(
        message, [OutgoingMessage(streams.settings().dead_letters_stream, message.value, message.key, headers)]
    )
    (letter,) = await streams.everything(streams.settings().dead_letters_stream)
    assert letter.value == original


def _too_large(streams: Streams) -> OutgoingMessage:
    return OutgoingMessage(streams.settings().verdicts_stream, os.urandom((1 << 20) + 1000))


@BOTH_DELIVERIES
async def test_settle_with_a_record_that_is_too_large_raises_and_keeps_the_message(streams: Streams) -> None:
    names = [str(number) for number in range(8)]
    await streams.submit(*names)
    member = await streams.member()
    received = await collect(member, 8)
    *before, refused = received[:6]
    settling = [asyncio.create_task(member.settle(each, [streams.verdict(each.value.decode())])) for each in before]
    # Under at-least-once delivery a refused record can fail records that are on their way. So here none is.
    await asyncio.gather(*settling)
    settling = [
        asyncio.create_task(member.settle(each, [streams.verdict(each.value.decode())])) for each in received[6:]
    ]
    if streams.delivery == "at_least_once":
        await asyncio.gather(*settling)
    with pytest.raises(ConfigurationError, match=r"max\.message\.bytes"):
        await member.settle(refused, [_too_large(streams)])
    if streams.delivery == "exactly_once":
        assert await streams.verdicts() == names[:5]
    await member.settle(refused, [streams.verdict("again")])
    await asyncio.gather(*settling)
    assert await streams.verdicts() == sorted([*names[:5], *names[6:], "again"])


@BOTH_DELIVERIES
async def test_record_that_is_too_large_loses_no_record_settled_with_it(streams: Streams) -> None:
    names = [str(number) for number in range(8)]
    await streams.submit(*names)
    member = await streams.member()
    received = await collect(member, 8)
    outputs = {name: [streams.verdict(name)] for name in names}
    outputs["5"].append(_too_large(streams))
    settling = {
        each.value.decode(): asyncio.create_task(member.settle(each, outputs[each.value.decode()])) for each in received
    }
    with pytest.raises(ConfigurationError, match=r"max\.message\.bytes"):
        await settling.pop("5")
    if streams.delivery == "exactly_once":
        assert await streams.verdicts() == names[:5]
    await member.settle(received[5], [streams.verdict("again")])
    await asyncio.gather(*settling.values())
    published = Counter(await streams.verdicts())
    if streams.delivery == "exactly_once":
        assert published == Counter([*names[:5], *names[6:], "again"])
    else:
        # The refused record fails the other records of the producer, and each is sent again: once, alone. The first
        # record of the refused message is published before the second one is refused.
        assert published.keys() == {*names, "again"}
        assert published["again"] == 1
        assert max(published.values()) <= 2


async def test_keys_are_partitioned_by_murmur2(streams: Streams) -> None:
    await streams.member()
    stream = streams.settings().submissions_stream
    await streams.publish(
        *(OutgoingMessage(stream, key, key) for key in (b"21", b"foobar", b"a-little-bit-long-string"))
    )
    found = {message.value: int(message.source.split("/")[1]) for message in await streams.everything(stream)}
    # murmur2 as in Kafka's own UtilsTest, without its sign, modulo the partitions
    hashes = {b"21": -973932308, b"foobar": -790332482, b"a-little-bit-long-string": -985981536}
    assert found == {key: (value & 0x7FFFFFFF) % 3 for key, value in hashes.items()}


@BOTH_DELIVERIES
async def test_aborted_messages_are_skipped_and_markers_are_no_lag(streams: Streams, kafka_address: str) -> None:
    """Aborted messages are not received, and the markers of transactions do not count as lag for ever."""
    member = await streams.member()
    stream = streams.settings().submissions_stream

    def produce() -> None:
        producer = kafka.KafkaProducer(bootstrap_servers=kafka_address, transactional_id=streams.name)
        producer.init_transactions()
        for value, finish in (
            (b"aborted", producer.abort_transaction),
            (b"committed", producer.commit_transaction),
            (b"aborted too", producer.abort_transaction),
        ):
            producer.begin_transaction()
            producer.send(stream, value, key=b"k")
            finish()
        producer.close()

    await asyncio.to_thread(produce)
    (message,) = await collect(member, 1)
    assert message.value == b"committed"
    assert (await member.lag()).total >= 1
    await member.settle(message, [])

    async def nothing_waits() -> bool:
        return (await member.lag()).total == 0

    await eventually(nothing_waits)
    assert await member.receive(1, 0.2) == []


@BOTH_DELIVERIES
async def test_consumer_with_full_buffer_pauses_and_resumes(streams: Streams) -> None:
    member: Any = await streams.member(in_flight=5)
    numbers = [str(number) for number in range(100)]
    await streams.submit(*numbers)
    received = await collect(member, 1)

    async def paused() -> bool:
        return bool(member._consumer.paused())

    await eventually(paused)
    received += await collect(member, 99)
    assert values(received) == numbers
    await settle_in_order(member, *((message, []) for message in reversed(received)))

    async def nothing_waits() -> bool:
        return bool((await member.lag()).total == 0)

    await eventually(nothing_waits)


async def test_message_with_null_value_is_received_as_empty(streams: Streams, kafka_address: str) -> None:
    member = await streams.member()

    def produce() -> None:
        producer = kafka.KafkaProducer(bootstrap_servers=kafka_address)
        producer.send(streams.settings().submissions_stream, None, key=b"k").get(10)
        producer.close()

    await asyncio.to_thread(produce)
    (message,) = await collect(member, 1)
    assert (message.value, message.key) == (b"", b"k")


class _Latin(str):
    """A header name as a careless client sends it."""

    __slots__ = ()

    def encode(self, *_: Any) -> bytes:
        return b"gr\xf6\xdfe"


async def test_header_name_that_is_not_utf8_is_received(streams: Streams, kafka_address: str) -> None:
    member = await streams.member()

    def produce() -> None:
        producer = kafka.KafkaProducer(bootstrap_servers=kafka_address, linger_ms=200)
        stream = streams.settings().submissions_stream
        producer.send(stream, b"before", key=b"k")
        producer.send(stream, b"odd", key=b"k", headers=[(_Latin("x"), b"1"), ("ok", b"2")])
        producer.send(stream, b"after", key=b"k")
        producer.close()

    await asyncio.to_thread(produce)
    before, odd, after = await collect(member, 3)
    assert values([before, odd, after]) == ["before", "odd", "after"]
    assert odd.headers == (("gr\\xf6\\xdfe", b"1"), ("ok", b"2"))


@BOTH_DELIVERIES
async def test_consumer_with_a_failed_poll_loses_no_message(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    member: Any = await streams.member()
    poll = member._consumer.poll
    failures: list[Any] = []

    def fail_after_consuming(**arguments: Any) -> Any:
        polled = poll(**arguments)
        if polled and len(failures) < 2:
            failures.append(polled)
            raise RuntimeError("after the position moved")
        return polled

    monkeypatch.setattr(member._consumer, "poll", fail_after_consuming)
    await streams.submit("a", "b")
    received = await collect(member, 2)
    assert values(received) == ["a", "b"]
    failures.clear()
    await streams.submit("c")
    assert values(await collect(member, 1)) == ["c"]
    assert len(failures) == 2


async def test_new_partitions_are_read_with_short_polls(
    streams: Streams, kafka_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A poll that ends in the middle of the rejoin must not leave the member half in, half out of the group."""
    monkeypatch.setattr("services.streams.kafka.consumer._POLL_MS", 2)
    member: Any = await streams.member()
    stream = streams.settings().submissions_stream
    await streams.submit("before")
    (before,) = await collect(member, 1)

    def add_partitions() -> None:
        admin = kafka.KafkaAdminClient(bootstrap_servers=kafka_address)
        admin.create_partitions({stream: 6})
        admin.wait_for_topics([stream])
        admin.close()

    await asyncio.to_thread(add_partitions)
    member._consumer._cluster.request_update()  # or it would notice within 5 minutes

    async def all_six() -> bool:
        partitions: set[Any] = member._consumer.assignment()
        return len(partitions) == 6

    await eventually(all_six)
    await streams.submit(*(str(number) for number in range(60)), key=None)
    received = [before, *await collect(member, 60)]
    for message in received:
        await member.settle(message, [])

    async def nothing_waits() -> bool:
        return bool((await member.lag()).total == 0)

    await eventually(nothing_waits)
    assert member._consumer.group_metadata().state == MemberState.STABLE


@BOTH_DELIVERIES
async def test_revocation_commits_done_messages(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second member gets its partitions without the messages that the first one settled out of order."""
    monkeypatch.setattr("services.streams.kafka.consumer._COMMIT_S", 600)  # only the revocation commits
    monkeypatch.setattr("services.streams.kafka.exactly_once._INTERVAL_S", 600)
    first = await streams.member("first", **PATIENT)
    for key in range(12):
        await streams.submit(f"{key}-settled", f"{key}-held", key=str(key).encode())
    received = await collect(first, 24)
    settling = []
    for message in reversed(received):
        if message.value.endswith(b"settled"):
            settling.append(asyncio.create_task(first.settle(message, [streams.verdict(message.value.decode())])))
            await asyncio.sleep(0)
    second = await streams.member("second", **PATIENT)
    oldest_held = {message.source.rsplit("/", 1)[0]: int(message.source.rsplit("/", 1)[1]) for message in received}
    for message in received:
        if message.value.endswith(b"held"):
            partition, offset = message.source.rsplit("/", 1)
            oldest_held[partition] = min(oldest_held[partition], int(offset))
    taken = await collect(second, 1)
    for message in taken:
        partition, offset = message.source.rsplit("/", 1)
        assert int(offset) >= oldest_held[partition]
    if streams.delivery == "exactly_once":
        # Of the first member's messages those are published that nothing held stands before, and only those.
        position = {each.value.decode(): each.source.rsplit("/", 1) for each in received}
        released = {name for name, (at, offset) in position.items() if int(offset) < oldest_held[at]}
        assert set(await streams.verdicts()) == released
    await first.close()
    outcomes = await asyncio.gather(*settling, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} <= {type(None), NotOwned}
    if streams.delivery == "exactly_once":
        assert len(await streams.verdicts()) == len([each for each in outcomes if each is None])


@BOTH_DELIVERIES
async def test_head_of_line_messages_are_those_that_hold_up_a_partition(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.streams.kafka.consumer._WINDOW_OFFSETS", 40)
    member = await streams.member(in_flight=2)
    await streams.submit(*(str(number) for number in range(100)))
    received: list[Message] = []
    settling: list[asyncio.Task[None]] = []
    assert not member.find_head_of_line_messages()

    async def find_blockers() -> Sequence[Message]:
        for message in await member.receive(10, 0.1):
            received.append(message)
            if message.value != b"0":
                settling.append(asyncio.create_task(member.settle(message, [])))
        return member.find_head_of_line_messages()

    (blocker,) = await eventually(find_blockers)
    assert blocker.value == b"0"
    assert 36 < len(received) <= 40
    # The other partitions go on, and so does this one afterwards.
    for key in range(6):
        await streams.submit("elsewhere", key=str(key).encode())
    assert values(await collect(member, 1)) == ["elsewhere"]
    assert [each.value for each in member.find_head_of_line_messages()] == [b"0"]
    await member.settle(blocker, [])
    await asyncio.gather(*settling)
    assert not member.find_head_of_line_messages()

    async def goes_on() -> bool:
        return b"45" in [each.value for each in await member.receive(10, 0.1)]

    await eventually(goes_on)


@BOTH_DELIVERIES
async def test_restarted_member_gets_its_partitions_without_a_rebalance(streams: Streams, tmp_path: Path) -> None:
    other: Any = await streams.member("other", member_id="other", **PATIENT)
    settings = streams.settings(member_id="comes-back", **PATIENT)
    doomed = SupervisedProcess(
        [sys.executable, "-m", "tests.streams.member", settings.model_dump_json()], log=tmp_path / "log"
    )

    async def both_work() -> bool:
        for key in range(6):
            await streams.submit("work", key=str(key).encode())
        await other.receive(100, 0.1)
        assert doomed.returncode is None, doomed.tail()
        return len(other._consumer.assignment()) < 3 and "received" in doomed.tail()

    await eventually(both_work)
    doomed.kill()
    generation = other._consumer.group_metadata().generation_id
    back: Any = await streams.member("back", member_id="comes-back", **PATIENT)
    await collect(back, 1, within_s=10)  # the session of its earlier life lasts 45 s
    assert not back._consumer.assignment() & other._consumer.assignment()
    await asyncio.sleep(0.5)  # more than a heartbeat
    assert other._consumer.group_metadata().generation_id == generation


@BOTH_DELIVERIES
async def test_member_killed_in_a_hand_over_and_restarted_leaves_no_partition_without_owner(
    streams: Streams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("services.streams.kafka.consumer._OWNERS_CHECK_S", 0.5)
    settings = streams.settings(member_id="comes-back", **PATIENT)
    argv = [sys.executable, "-m", "tests.streams.member", settings.model_dump_json(), "dies in a hand-over"]
    doomed = SupervisedProcess(argv, log=tmp_path / "log")
    for key in range(12):
        await streams.submit(str(key), key=str(key).encode())

    async def works() -> bool:
        assert doomed.returncode is None, doomed.tail()
        return doomed.tail().count("received") == 12

    await eventually(works)
    other: Any = await streams.member("other", member_id="other", **PATIENT)

    async def dead() -> bool:
        return doomed.returncode is not None

    await eventually(dead)
    back: Any = await streams.member("back", member_id="comes-back", **PATIENT)
    received: dict[str, str] = {}

    async def all_received() -> bool:
        for name, member in (("back", back), ("other", other)):
            for message in await member.receive(100, 0.1):
                received.setdefault(message.value.decode(), name)
        return len(received) == 12

    await eventually(all_received)
    assert "without an owner" in caplog.text
    assert set(received.values()) == {"back", "other"}


async def test_rebalance_is_requested_by_a_member_that_claims_the_same_partitions_as_before(streams: Streams) -> None:
    leader: Any = await streams.member("leader", **PATIENT)
    member: Any = await streams.member("member", **PATIENT)

    async def both_own() -> bool:
        return {len(each._consumer.assignment()) for each in (leader, member)} == {1, 2}

    await eventually(both_own)
    for _ in range(3):
        generation = leader._consumer.group_metadata().generation_id
        member._rebalance.request()

        async def rebalanced(generation: int = generation) -> bool:
            groups = [each._consumer.group_metadata() for each in (leader, member)]
            return all(each.generation_id > generation and each.state == MemberState.STABLE for each in groups)

        await eventually(rebalanced)
        assert await both_own()
    member._consumer._coordinator.request_rejoin()  # to join again is not enough
    await asyncio.sleep(1)
    assert leader._consumer.group_metadata().generation_id == member._consumer.group_metadata().generation_id
    assert member._consumer.group_metadata().generation_id == generation + 1


@BOTH_DELIVERIES
async def test_second_member_of_one_id_ends_one_and_the_other_continues(streams: Streams) -> None:
    await streams.submit(*map(str, range(20)))
    members = [await streams.member(name, member_id="the-same") for name in ("first", "second")]
    working = [asyncio.create_task(settle_all(member, streams)) for member in members]
    (told,), (going_on,) = await asyncio.wait(working, return_when=asyncio.FIRST_COMPLETED, timeout=60)
    with pytest.raises(ConfigurationError, match="SLUICE_MEMBER_ID=the-same"):
        told.result()
    await streams.submit("after")

    async def judged() -> bool:
        assert not going_on.done()
        return set(await streams.verdicts()) == {*map(str, range(20)), "after"}

    await eventually(judged)
    going_on.cancel()


async def settle_all(member: GroupConsumer, streams: Streams) -> None:
    while True:
        for message in await member.receive(1, 0.1):
            with suppress(NotOwned):
                await member.settle(message, [streams.verdict(message.value.decode())])


@BOTH_DELIVERIES
async def test_fenced_member_joins_again(streams: Streams) -> None:
    """A restarted broker may know an earlier start of the member."""
    member: Any = await streams.member(member_id="alone")
    await streams.submit("a")
    (held,) = await collect(member, 1)
    coordinator = member._consumer._coordinator
    known = coordinator._generation
    coordinator._generation = Generation(known.generation_id, "an-earlier-life", known.protocol)
    (again,) = await collect(member, 1)
    with pytest.raises(NotOwned):
        await member.settle(held, [streams.verdict("stale")])
    await member.settle(again, [streams.verdict("a")])
    assert await streams.verdicts() == ["a"]


async def test_broker_that_fails_during_a_join_is_unavailable(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(_self: Any, _topic: str) -> None:
        raise KafkaConnectionError("socket disconnected")

    monkeypatch.setattr(kafka.KafkaConsumer, "partitions_for_topic", cut)
    with pytest.raises(StreamUnavailable, match=r"became unavailable while member joined .*socket disconnected"):
        await streams.member()


async def test_member_id_with_several_replicas_is_rejected(streams: Streams) -> None:
    with pytest.raises(ConfigurationError, match="there may be 2 intake replicas"):
        await streams.member(member_id="one", intake_replicas=2)

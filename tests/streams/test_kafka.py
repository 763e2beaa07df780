"""What only Kafka has: topics, partitions, sizes, transactions."""

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

import kafka
import pytest
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.structs import MemberState

from services.errors import ConfigurationError
from services.streams.transport import Record
from tests.streams.conftest import PATIENT, Streams, collect, eventually, values

pytestmark = pytest.mark.kafka


@pytest.fixture
async def streams(kafka_address: str) -> AsyncIterator[Streams]:
    streams = Streams("kafka", f"kafka://{kafka_address}")
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


async def test_a_whole_message_fits_into_a_dead_letter(streams: Streams) -> None:
    member = await streams.member()
    original = os.urandom((1 << 20) - 200)  # as large as the broker takes, and no compression helps
    await streams.publish(Record(streams.settings().submissions_stream, original, b"key"))
    (message,) = await collect(member, 1)
    headers = (("sluice-detail", b"x" * 1000),)
    await member.settle(message, [Record(streams.settings().dead_letters_stream, message.value, message.key, headers)])
    (letter,) = await streams.everything(streams.settings().dead_letters_stream)
    assert letter.value == original


async def test_a_record_that_is_too_large_is_refused_and_the_message_stays(streams: Streams) -> None:
    await streams.submit("a", "b")
    member = await streams.member()
    first, second = await collect(member, 2)
    with pytest.raises(ConfigurationError, match=r"max\.message\.bytes"):
        await member.settle(first, [Record(streams.settings().verdicts_stream, os.urandom(2 << 20))])
    await member.settle(second, [streams.verdict("b")])
    await member.settle(first, [streams.verdict("a")])
    assert await streams.verdicts() == ["a", "b"]


async def test_keys_are_partitioned_as_every_kafka_client_does_it(streams: Streams) -> None:
    await streams.member()
    stream = streams.settings().submissions_stream
    await streams.publish(*(Record(stream, key, key) for key in (b"21", b"foobar", b"a-little-bit-long-string")))
    found = {message.value: int(message.source.split("/")[1]) for message in await streams.everything(stream)}
    # murmur2 as in Kafka's own UtilsTest, without its sign, modulo the partitions
    hashes = {b"21": -973932308, b"foobar": -790332482, b"a-little-bit-long-string": -985981536}
    assert found == {key: (value & 0x7FFFFFFF) % 3 for key, value in hashes.items()}


async def test_transactions(streams: Streams, kafka_address: str) -> None:
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


async def test_a_full_buffer_pauses_and_goes_on(streams: Streams) -> None:
    member = await streams.member(in_flight=5)
    numbers = [str(number) for number in range(100)]
    await streams.submit(*numbers)
    received = await collect(member, 1)
    await asyncio.sleep(0.5)  # the poll thread goes on without us
    received += await collect(member, 99)
    assert values(received) == numbers
    for message in reversed(received):
        await member.settle(message, [])

    async def nothing_waits() -> bool:
        return (await member.lag()).total == 0

    await eventually(nothing_waits)


async def test_a_null_value_is_an_empty_one(streams: Streams, kafka_address: str) -> None:
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


async def test_a_header_name_that_is_not_utf8_stops_nobody(streams: Streams, kafka_address: str) -> None:
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


async def test_a_poll_that_fails_loses_nothing(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
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


async def test_new_partitions_are_read_however_short_the_polls(
    streams: Streams, kafka_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A poll that ends in the middle of the rejoin must not leave the member half in, half out of the group."""
    monkeypatch.setattr("services.streams.kafka._POLL_MS", 2)
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


async def test_revocation_commits_what_is_done(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second member gets its share without what the first one settled, though that came in no order."""
    monkeypatch.setattr("services.streams.kafka._COMMIT_S", 600)  # only the revocation commits
    first = await streams.member("first", **PATIENT)
    for key in range(12):
        await streams.submit(f"{key}-settled", f"{key}-held", key=str(key).encode())
    received = await collect(first, 24)
    for message in reversed(received):
        if message.value.endswith(b"settled"):
            await first.settle(message, [])
    second = await streams.member("second", **PATIENT)
    oldest_held = {message.source.rsplit("/", 1)[0]: int(message.source.rsplit("/", 1)[1]) for message in received}
    for message in received:
        if message.value.endswith(b"held"):
            partition, offset = message.source.rsplit("/", 1)
            oldest_held[partition] = min(oldest_held[partition], int(offset))
    for message in await collect(second, 1):
        partition, offset = message.source.rsplit("/", 1)
        assert int(offset) >= oldest_held[partition]

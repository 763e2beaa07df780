"""The defects of kafka-python that Sluice works around. A test that fails here says that a work-around can go."""

import asyncio
import contextlib
import inspect
import time
import uuid
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import kafka
import pytest
from kafka import AsyncConsumerRebalanceListener, errors
from kafka.consumer.fetcher import Fetcher
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.errors import CorruptRecordError, FencedInstanceIdError
from kafka.future import Future
from kafka.record.default_records import DefaultRecordBatch, DefaultRecordBatchBuilder
from kafka.structs import MemberState, OffsetAndMetadata

from services.streams.kafka import compat
from tests.support.kafka_broker import Broker

TOPIC_PARTITION = kafka.TopicPartition("submissions", 0)


class _Latin1Name(str):
    """A header name that a careless client sends."""

    __slots__ = ()

    def encode(self, *_: Any) -> bytes:
        return b"gr\xf6\xdfe"


def test_installed_release_is_the_one_the_workarounds_were_written_for() -> None:
    """The tests below say which work-arounds can go: remove those first, then change the number."""
    assert kafka.__version__ == "3.0.12"


def test_header_name_that_is_not_utf8_raises_without_the_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = DefaultRecordBatchBuilder(
        magic=2,
        compression_type=0,
        is_transactional=0,
        producer_id=-1,
        producer_epoch=-1,
        base_sequence=-1,
        batch_size=10_000,
    )
    builder.append(0, 1_000, b"key", b"value", [(_Latin1Name("x"), b"1"), ("ok", b"2")])
    data = bytes(builder.build())
    monkeypatch.setattr(DefaultRecordBatch, "_read_msg", compat.strict_read_msg)
    with pytest.raises(CorruptRecordError, match="UnicodeDecodeError"):
        list(DefaultRecordBatch(data))
    compat.patch_header_decoding()
    (record,) = DefaultRecordBatch(data)
    assert (record.key, record.value, record.timestamp) == (b"key", b"value", 1_000)
    assert list(record.headers) == [("gr\\xf6\\xdfe", b"1"), ("ok", b"2")]


def test_parked_records_of_a_resumed_partition_are_not_restored_without_the_reset() -> None:
    class Records(list[str]):
        topic_partition = TOPIC_PARTITION
        next_fetch_offset = 0

    fetcher = Fetcher.__new__(Fetcher)
    fetcher._subscriptions = SimpleNamespace(is_paused=lambda _: False)
    fetcher._completed_fetches = deque()
    fetcher._paused_completed_fetches = {}
    fetcher._paused_partition_records = {TOPIC_PARTITION: Records(["parked"])}
    fetcher._next_in_line_exception_metadata = None
    fetcher._next_partition_records = Records()  # used up

    def append(drained: Any, records: Any, _max: int, _update: bool) -> int:
        drained[records.topic_partition] += records
        count = len(records)
        records.clear()
        return count

    fetcher._append = append
    assert fetcher.fetched_records(5)[0] == {}
    compat.restore_paused_records(SimpleNamespace(_fetcher=fetcher))
    assert fetcher.fetched_records(5)[0] == {TOPIC_PARTITION: ["parked"]}


def test_transaction_requests_have_no_time_limit() -> None:
    producer = kafka.KafkaProducer
    for method in (producer.commit_transaction, producer.abort_transaction, producer.send_offsets_to_transaction):
        assert not [name for name in inspect.signature(method).parameters if "timeout" in name]


def test_producer_has_no_limit_for_undelivered_records() -> None:
    assert "buffer_memory" not in kafka.KafkaProducer.DEFAULT_CONFIG


@pytest.mark.parametrize(("state", "requested"), [(MemberState.REBALANCING, 1), (MemberState.STABLE, 0)])
def test_missed_rejoin_is_requested_only_while_rebalancing(state: MemberState, requested: int) -> None:
    requests: list[None] = []
    consumer = SimpleNamespace(
        group_metadata=lambda: SimpleNamespace(state=state),
        _coordinator=SimpleNamespace(request_rejoin=lambda: requests.append(None)),
    )
    compat.request_missed_rejoin(consumer)
    assert len(requests) == requested


# ---- with a broker


class _Group:
    """A topic and consumers of kafka-python alone, all in one group."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.topic = f"test-{uuid.uuid4().hex[:12]}"
        self._consumers: list[Any] = []
        self._producers: list[Any] = []
        admin = kafka.KafkaAdminClient(bootstrap_servers=address)
        admin.create_topics({self.topic: {"num_partitions": 1, "replication_factor": 1}})
        admin.wait_for_topics([self.topic])
        admin.close()

    def add_partition(self) -> None:
        admin = kafka.KafkaAdminClient(bootstrap_servers=self.address)
        admin.create_partitions({self.topic: 2})
        admin.wait_for_topics([self.topic])
        admin.close()

    def producer(self, **options: Any) -> Any:
        producer = kafka.KafkaProducer(bootstrap_servers=self.address, **options)
        self._producers.append(producer)
        return producer

    def join(self, assignor: Any = CooperativeStickyAssignor, listener: Any = None, **options: Any) -> Any:
        consumer = kafka.KafkaConsumer(
            bootstrap_servers=self.address,
            group_id=f"{self.topic}.group",
            enable_auto_commit=False,
            heartbeat_interval_ms=200,
            partition_assignment_strategy=[assignor],
            **options,
        )
        self._consumers.append(consumer)
        if listener is not None:
            listener.consumer = consumer
        consumer.subscribe([self.topic], listener=listener)
        deadline = time.monotonic() + 60
        while not consumer.assignment():
            assert time.monotonic() < deadline, "the consumer was not assigned the partition within 60 s"
            compat.request_missed_rejoin(consumer)
            consumer.poll(timeout_ms=1_000)
        return consumer

    def close(self) -> None:
        for consumer in self._consumers:
            consumer.close(autocommit=False, timeout_ms=1_000)
        for producer in self._producers:
            with contextlib.suppress(errors.KafkaError):
                producer.close(timeout=0)
            producer._sender.force_close()


@pytest.fixture
def group(kafka_address: str) -> Iterator[_Group]:
    group = _Group(kafka_address)
    yield group
    group.close()


@pytest.fixture
def outage_group(outage_broker: Broker) -> Iterator[_Group]:
    """On the broker that a test may kill and start again."""
    if not outage_broker.is_running:
        outage_broker.start()
    group = _Group(outage_broker.address)
    yield group
    group.close()


@pytest.mark.kafka
def test_stale_offset_fetch_answers_a_new_question_without_the_reset(group: _Group) -> None:
    consumer = group.join()
    (partition,) = consumer.assignment()
    consumer.commit({partition: OffsetAndMetadata(7, "", -1)})
    stale = {partition: OffsetAndMetadata(3, "", -1)}
    futures = consumer._coordinator._offset_fetch_futures
    futures[frozenset([partition])] = Future().success(stale)
    assert consumer.committed(partition) == 3
    futures[frozenset([partition])] = Future().success(stale)
    compat.forget_offset_fetches(consumer, [partition])
    assert consumer.committed(partition) == 7


@pytest.mark.kafka
def test_member_that_lost_its_membership_claims_its_partitions_without_the_fix(group: _Group) -> None:
    assignor = CooperativeStickyAssignor()
    consumer = group.join(assignor)
    assert consumer._coordinator._generation.generation_id > 0
    consumer._coordinator.reset_generation()
    assert consumer._coordinator._generation.is_lost()
    (claimed,) = assignor.metadata([group.topic]).owned_partitions
    assert (claimed.topic, claimed.partitions) == (group.topic, [0])


@pytest.mark.kafka
def test_fenced_member_polls_on_without_the_check(group: _Group) -> None:
    first = group.join(group_instance_id="same")
    compat.raise_if_fenced(first)
    group.join(group_instance_id="same")
    deadline = time.monotonic() + 30

    def is_fenced() -> bool:
        try:
            compat.raise_if_fenced(first)
        except FencedInstanceIdError:
            return True
        return False

    while not is_fenced():
        assert time.monotonic() < deadline, "the first member was not fenced within 30 s"
        first.poll(timeout_ms=100)
    for _ in range(5):
        first.poll(timeout_ms=200)


@pytest.mark.kafka
def test_poll_that_ends_during_a_rejoin_leaves_the_member_out_without_the_request(group: _Group) -> None:
    consumer = group.join()
    coordinator = consumer._coordinator
    group.add_partition()
    consumer._cluster.request_update()
    deadline = time.monotonic() + 30
    while coordinator.state != MemberState.REBALANCING:
        assert time.monotonic() < deadline, "the new partition caused no rejoin within 30 s"
        consumer.poll(timeout_ms=0)
    while not coordinator._join_task.is_done:
        assert time.monotonic() < deadline, "the broker did not answer the rejoin within 30 s"
        time.sleep(0.01)
    for _ in range(3):
        consumer.poll(timeout_ms=500)
    assert coordinator.state == MemberState.REBALANCING
    assert not coordinator._heartbeat_enabled
    while coordinator.state != MemberState.STABLE:
        assert time.monotonic() < deadline, "the member did not complete the rejoin within 30 s"
        compat.request_missed_rejoin(consumer)
        consumer.poll(timeout_ms=500)


@pytest.mark.kafka
def test_rebalance_listener_cannot_wait_with_asyncio(group: _Group) -> None:
    outcomes: list[str] = []

    class Listener(AsyncConsumerRebalanceListener):
        consumer: Any = None

        async def on_partitions_assigned(self, _: Any) -> None:
            try:
                await asyncio.sleep(0.01)
            except RuntimeError as error:
                outcomes.append(str(error))
            began = time.monotonic()
            await compat.sleep_on_kafka_thread(self.consumer, 0.1)
            outcomes.append("waited" if time.monotonic() - began >= 0.1 else "did not wait")

        async def on_partitions_revoked(self, _: Any) -> None:
            pass

    listener = Listener()
    group.join(listener=listener)
    assert outcomes == ["no running event loop", "waited"]


@pytest.mark.kafka
def test_close_with_undelivered_records_leaves_the_thread_running_without_end_sender(
    outage_group: _Group, outage_broker: Broker
) -> None:
    producer = outage_group.producer(acks="all")
    producer.send(outage_group.topic, b"delivered").get(timeout=30)
    outage_broker.kill()
    producer.send(outage_group.topic, b"undelivered")
    with pytest.raises(errors.KafkaTimeoutError):
        producer.close(timeout=0.5)
    assert producer._sender.is_alive()
    compat.end_sender(producer)
    producer._sender.join(30)
    assert not producer._sender.is_alive()


@pytest.mark.kafka
def test_rejected_record_ends_an_idempotent_producer(group: _Group) -> None:
    producer = group.producer(acks="all", enable_idempotence=True, max_request_size=16 << 20)
    rejected = producer.send(group.topic, bytes(2 << 20))
    with pytest.raises(errors.MessageSizeTooLargeError):
        rejected.get(timeout=30)
    with pytest.raises(errors.KafkaError):
        producer.send(group.topic, b"v").get(timeout=30)


@pytest.mark.kafka
def test_undelivered_record_does_not_fail_its_transaction(outage_group: _Group, outage_broker: Broker) -> None:
    topic = outage_group.topic
    producer = outage_group.producer(
        transactional_id=topic, acks="all", request_timeout_ms=1_000, delivery_timeout_ms=2_000
    )
    producer.init_transactions()
    producer.begin_transaction()
    producer.send(topic, b"delivered").get(timeout=30)
    outage_broker.kill()
    undelivered = producer.send(topic, b"undelivered")
    with pytest.raises(errors.KafkaError):
        undelivered.get(timeout=30)
    outage_broker.start()
    producer.commit_transaction()


@pytest.mark.kafka
def test_offsets_of_an_aborted_transaction_are_sent_with_the_next_one(group: _Group) -> None:
    group.add_partition()
    # Such a consumer reads an offset only once the broker has written the end of the transaction beside it.
    consumer = group.join(isolation_level="read_committed")
    stale, other = (kafka.TopicPartition(group.topic, each) for each in (0, 1))
    member = consumer.group_metadata()
    producer = group.producer(transactional_id=group.topic, acks="all")
    producer.init_transactions()
    producer.begin_transaction()
    earlier = member._replace(generation_id=member.generation_id + 1)
    with pytest.raises(errors.KafkaError):
        producer.send_offsets_to_transaction({stale: OffsetAndMetadata(5, "", -1)}, earlier)
    producer.abort_transaction()
    producer.begin_transaction()
    producer.send_offsets_to_transaction({other: OffsetAndMetadata(7, "", -1)}, consumer.group_metadata())
    producer.commit_transaction()
    assert (consumer.committed(stale), consumer.committed(other)) == (5, 7)

"""Joins a consumer group, and hands partitions over when the group rebalances."""

import logging
import time
from collections.abc import Iterable
from typing import Any, Final, Protocol

import kafka
from kafka import AsyncConsumerRebalanceListener, errors

from services.core.errors import StreamUnavailable
from services.streams.config import StreamConfig
from services.streams.kafka.client import connect
from services.streams.kafka.commits import commit_on_revocation
from services.streams.kafka.compat import FixedCooperativeStickyAssignor, forget_offset_fetches, sleep_on_kafka_thread

log = logging.getLogger(__name__)

_HAND_OVER_S: Final = 5.0
_CHECK_S: Final = 0.01


class Owner(Protocol):
    """Holds the messages that the consumer received. Called from kafka-python's own thread."""

    def drop_partitions(self, partitions: Iterable[Any]) -> dict[Any, int]:
        """Drop the held messages of `partitions`. Returns the offsets to commit for them."""

    def flush(self) -> Any | None:
        """Start to commit the done offsets. The event is set afterwards. None: there is nothing to wait for."""


class Rebalance(AsyncConsumerRebalanceListener):  # type: ignore[misc]
    """Runs on kafka-python's own thread while the poll thread waits inside `poll`."""

    owner: Owner
    """Set before the first poll, which is when partitions can be assigned for the first time."""

    def __init__(self, consumer: Any, assignor: FixedCooperativeStickyAssignor) -> None:
        self._consumer = consumer
        self._assignor = assignor

    def request(self) -> None:
        """Let the whole group rebalance. Any thread may call it."""
        self._assignor.request_rebalance()

    async def on_partitions_assigned(self, assigned: set[Any]) -> None:
        """Drop leftovers of an earlier assignment; then kafka-python starts at the committed offsets."""
        self.owner.drop_partitions(assigned)
        forget_offset_fetches(self._consumer)
        log.info("partitions assigned: %s", sorted(assigned))

    async def on_partitions_revoked(self, revoked: set[Any]) -> None:
        """Commit the done offsets: the next owner of the partitions starts when this returns."""
        flushed = self.owner.flush()
        if flushed is not None:
            # Half of the time that the group waits for this member.
            wait_s = min(_HAND_OVER_S, self._consumer.config["max_poll_interval_ms"] / 2000)
            deadline = time.monotonic() + wait_s
            while not flushed.is_set() and time.monotonic() < deadline:
                await sleep_on_kafka_thread(self._consumer, _CHECK_S)
        offsets = self.owner.drop_partitions(revoked)
        if offsets:
            await commit_on_revocation(self._consumer, offsets)

    def drop_lost(self, lost: Iterable[Any]) -> None:
        """Drop the messages of partitions that were lost while the member was joining."""
        self.owner.drop_partitions(lost)

    async def on_partitions_lost(self, lost: set[Any]) -> None:
        """Drop the messages without a commit: this member is no longer in the group."""
        log.warning("partitions lost without a commit: %s; other members judge their messages again", sorted(lost))
        self.owner.drop_partitions(lost)


def subscribe(config: StreamConfig, member: str) -> tuple[Any, Rebalance]:
    """Make a consumer, subscribe it, and return it with its listener. It joins at its first poll. Blocks.

    Raises:
        ConfigurationError: an option, or the credentials, are wrong.
        StreamUnavailable: no broker answers.
    """
    assignor = FixedCooperativeStickyAssignor()
    consumer = connect(
        config,
        kafka.KafkaConsumer,
        client_id=member,
        group_id=config.group,
        group_instance_id=config.member_id or None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        partition_assignment_strategy=[assignor],
    )
    listener = Rebalance(consumer, assignor)
    assignor.consumer = consumer
    assignor.on_lost = listener.drop_lost
    consumer.subscribe([config.submissions_stream], listener=listener)
    try:
        # A member that joins before it knows the partitions makes the group rebalance twice.
        consumer.partitions_for_topic(config.submissions_stream)
    except (errors.KafkaError, OSError) as error:
        consumer.close(autocommit=False, timeout_ms=0)
        raise StreamUnavailable(f"Kafka became unavailable while {member} joined {config.group}: {error}.") from error
    return consumer, listener


def get_group_metadata(consumer: Any) -> Any | None:
    """Identifies the member in a transaction. None while it is not in the group: the broker would not check it."""
    group = consumer.group_metadata()
    return group if group.generation_id >= 0 and group.member_id else None

"""The consumer of a group's member, and what kafka-python 3.0.12's needs from its user."""

import logging
import time
from collections.abc import Iterable
from typing import Any, Final, Protocol

import kafka
from kafka import AsyncConsumerRebalanceListener, errors
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.structs import MemberState

from services.core.errors import StreamUnavailable
from services.core.settings import Settings
from services.streams.kafka.client import connect

log = logging.getLogger(__name__)

_HAND_OVER_S: Final = 5.0
_LOOK_S: Final = 0.01


class Owner(Protocol):
    """Whoever holds what the consumer received. Called from kafka-python's own thread."""

    def drop_partitions(self, partitions: Iterable[Any]) -> dict[Any, Any]:
        """Drop what is held of `partitions`. Returns the offsets to commit for them."""

    def flush(self) -> Any | None:
        """Begin to commit what is done; an event that tells when, or None where there is nothing to wait for."""


class FixedCooperativeStickyAssignor(CooperativeStickyAssignor):  # type: ignore[misc]
    """Claims only what this member owns when it joins.

    kafka-python 3.0.12 goes on to claim what it has lost, so that the leader gives it to two members in the same
    generation. And when the membership is lost while the member is joining anyway, it calls nobody and keeps it.
    """

    consumer: Any
    listener: "Rebalance"

    def metadata(self, topics: Any) -> Any:
        """What is sent with a request to join. Runs on kafka-python's own thread."""
        coordinator = self.consumer._coordinator
        if coordinator._generation.is_lost():
            self.member_assignment = None
            lost = self.consumer.assignment()
            if lost:
                log.warning("lost while joining: %s", sorted(lost))
                self.consumer._subscription.assign_from_subscribed([])
                self.listener.owner.drop_partitions(lost)
        return super().metadata(topics)


class Rebalance(AsyncConsumerRebalanceListener):  # type: ignore[misc]
    """Runs on kafka-python's own thread while the poll thread waits inside `poll`."""

    owner: Owner
    """Set before the first poll, which is when partitions can be assigned for the first time."""

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer

    async def on_partitions_assigned(self, assigned: set[Any]) -> None:
        """Begin at the committed offsets of now."""
        self.owner.drop_partitions(assigned)  # whatever is left of an earlier time
        # kafka-python 3.0.12 would take the answer to a question that it gave up asking, during an earlier assignment.
        self._consumer._coordinator._offset_fetch_futures.clear()
        log.info("assigned: %s", sorted(assigned))

    async def on_partitions_revoked(self, revoked: set[Any]) -> None:
        """The next owner starts after this returned, so what is done is committed first."""
        flushed = self.owner.flush()
        if flushed is not None:
            # Half of the time that the group waits for this member.
            patience_s = min(_HAND_OVER_S, self._consumer.config["max_poll_interval_ms"] / 2000)
            deadline = time.monotonic() + patience_s
            while not flushed.is_set() and time.monotonic() < deadline:
                await self._consumer._net.sleep(_LOOK_S)  # the heartbeats go on
        offsets = self.owner.drop_partitions(revoked)
        if offsets:
            try:
                await self._consumer.commit_async(offsets)
            except errors.KafkaError as error:
                log.warning("could not commit on revocation, some messages will be judged again: %s", error)

    async def on_partitions_lost(self, lost: set[Any]) -> None:
        """This member was thrown out: it has nothing to commit any more."""
        log.warning("lost: %s", sorted(lost))
        self.owner.drop_partitions(lost)


def subscribe(settings: Settings, member: str) -> tuple[Any, Rebalance]:
    """A consumer of the submissions that has not joined its group yet, and its listener. Blocks.

    Raises:
        ConfigurationError: an option, or the credentials, are wrong.
        StreamUnavailable: no broker answers.
    """
    assignor = FixedCooperativeStickyAssignor()
    consumer = connect(
        settings,
        kafka.KafkaConsumer,
        client_id=member,
        group_id=settings.group,
        group_instance_id=settings.member_id or None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        partition_assignment_strategy=[assignor],
    )
    listener = Rebalance(consumer)
    assignor.consumer, assignor.listener = consumer, listener
    consumer.subscribe([settings.submissions_stream], listener=listener)
    try:
        # A member that joins before it knows the partitions makes the group rebalance twice.
        consumer.partitions_for_topic(settings.submissions_stream)
    except (errors.KafkaError, OSError) as error:
        consumer.close(autocommit=False, timeout_ms=0)
        raise StreamUnavailable(f"Kafka went away while {member} joined {settings.group}: {error}.") from error
    return consumer, listener


def request_missed_rejoin(consumer: Any) -> None:
    """kafka-python 3.0.12 forgets a rejoin of its own (the partitions changed) when a poll ends in the middle of it:
    no heartbeats, no commits any more. Asking again for the same rejoin does no harm.
    """
    if consumer.group_metadata().state == MemberState.REBALANCING:
        consumer._coordinator.request_rejoin()


def reset_stale_parked_records(consumer: Any) -> None:
    """kafka-python 3.0.12 sets the records of a paused partition aside, and never looks at them again when those of
    another partition came meanwhile: it takes what is left of those, which is nothing, for something. Before each poll.
    """
    if not consumer._fetcher._next_partition_records:
        consumer._fetcher._next_partition_records = None


def raise_if_fenced(consumer: Any) -> None:
    """kafka-python 3.0.12 notices in a heartbeat that another member has this one's identity, and goes on as before.

    Raises:
        FencedInstanceIdError: that has happened.
    """
    coordinator = consumer._coordinator
    if coordinator.stable() and not coordinator._heartbeat_enabled and not coordinator.need_rejoin():
        raise errors.FencedInstanceIdError("the heartbeat was refused")


def group_metadata(consumer: Any) -> Any | None:
    """What a transaction names its member by; None while it is not in the group, when the broker would not check it."""
    group = consumer.group_metadata()
    return group if group.generation_id >= 0 and group.member_id else None


def committed(consumer: Any, partition: Any, timeout_ms: int) -> int | None:
    """The group's committed offset, once no transaction that could move it is under way; None: there is none. Blocks.

    Raises:
        KafkaError: no answer.
    """
    # See on_partitions_assigned.
    consumer._coordinator._offset_fetch_futures.pop(frozenset([partition]), None)
    offset: int | None = consumer.committed(partition, timeout_ms=timeout_ms)
    return offset

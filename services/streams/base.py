"""The interfaces of a stream system: the member of a consumer group, the publisher and the reader.

A message is in one of three states: *held* (received, not settled), *settled* (its outputs are published, and it
is or will be acknowledged), or *not owned* (another member owns it now). Only `settle` ends the work on a message: a
message that is never settled is received again, by this member or by another one.

On Redis Streams, and with exactly-once delivery on Kafka, outputs and acknowledgement are one act. With at-least-once
delivery on Kafka, the offset is committed later. A crash in between repeats the outputs.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

Headers = tuple[tuple[str, bytes], ...]


@dataclass(frozen=True, slots=True)
class OutgoingMessage:
    """A message to publish: on Kafka a record's key, value and headers, on Redis Streams the fields of an entry."""

    stream: str
    value: bytes
    key: bytes | None = None
    headers: Headers = ()


@dataclass(frozen=True, slots=True)
class Message:
    """A message that was received. It is held until it is settled."""

    value: bytes
    key: bytes | None
    headers: Headers
    source: str
    """Its position: `stream/partition/offset` (Kafka) or `stream/id` (Redis Streams). It identifies the message in
    logs, dead letters and crash counts; no adapter parses it."""
    timestamp: datetime
    """When it was published (UTC)."""
    attempts: int = 1
    """How often it was delivered, as far as the stream system knows."""
    token: Any = field(default=None, repr=False)
    """Used only by the stream adapter that received the message."""

    def header(self, name: str) -> bytes | None:
        """The last header of that name (case-insensitive, as HTTP and CloudEvents have it), or None."""
        return next((value for key, value in reversed(self.headers) if key.lower() == name.lower()), None)


@dataclass(frozen=True, slots=True)
class Lag:
    """The backlog: messages published and not acknowledged, by partition (Redis Streams: one partition, `0`).

    On Kafka, it counts all messages from the committed offset on, also settled ones behind a held one.
    """

    by_partition: Mapping[int, int]
    published: int = 0
    """Total messages ever published. It falls only if the stream is deleted and created again."""
    partitions: int = 0
    """Number of partitions, each consumed by one member; 0 on Redis Streams, which has none."""
    owned_partitions: frozenset[int] = frozenset()
    """The partitions that this member consumes."""

    @property
    def total(self) -> int:
        return sum(self.by_partition.values())


class GroupConsumer(Protocol):
    """One member of a consumer group. Every method is called from one event loop."""

    async def receive(self, max_messages: int, timeout_s: float) -> Sequence[Message]:
        """Wait for up to `timeout_s` and return 0..`max_messages` messages. The member keeps polling between two calls.

        During an outage of the stream system it returns an empty batch. Raises:
            ConfigurationError: another member has joined with this member's `member_id`; this member left the group.
        """

    async def settle(self, message: Message, records: Sequence[OutgoingMessage]) -> None:
        """Publish `records` and acknowledge `message`. May be called out of order.

        Returns when the records are durable and the message is acknowledged; with at-least-once delivery on Kafka,
        when the records are durable and the offset is marked to be committed.

        During an outage it retries. Raises:
            NotOwned: another member owns the message now; drop it. (On Kafka, under at-least-once delivery, the
                records may have been published.)
            ConfigurationError: a record is too large for its stream, so a retry cannot help. The message is still
                held.
        """

    async def lag(self) -> Lag:
        """The backlog of the whole group.

        Raises:
            StreamUnavailable: the stream system does not answer.
        """

    def find_head_of_line_messages(self) -> Sequence[Message]:
        """The held messages that will soon stop the receipt of later messages.

        On Kafka, the member remembers the messages of a partition from the oldest held one on, at most 4096 or 16 times
        `in_flight`, whichever is more. When there is room for less than `in_flight`, it receives no more from the
        partition. On Redis Streams no message blocks another, so this
        is empty.
        """

    async def close(self) -> None:
        """Leave the group. Settled messages stay settled; held messages go to other members at once."""


class Publisher(Protocol):
    """Publishes without being a member of a group: the gateway, the command line."""

    async def publish(self, records: Sequence[OutgoingMessage]) -> None:
        """Publish and wait until it is durable.

        Raises:
            StreamUnavailable: the stream system does not answer.
        """

    async def close(self) -> None:
        """Release the connections."""


class Reader(Protocol):
    """Reads a whole stream without being a member of a group: the command line, reconciliation."""

    def read(self, stream: str, *, follow: bool, since: datetime | None = None) -> AsyncIterator[Message]:
        """Yield every message from `since` (default: the oldest) to the present end; with `follow`, never end.

        Raises:
            StreamUnavailable: the stream system does not answer.
        """

    async def close(self) -> None:
        """Release the connections."""

"""Order by key: messages that share a key are processed one after the other, and all others at the same time."""

import asyncio
from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from services.core.errors import Unjudgeable
from services.moderation.moderator import ModerationResult
from services.streams.parsing import ParsedSubmission, is_before

_MAX_OBJECTS: Final = 10_000


@dataclass(frozen=True, slots=True)
class KeyTicket:
    """One message's position in the queue of each of its keys."""

    keys: frozenset[bytes]
    earlier: tuple[asyncio.Event, ...]
    released: asyncio.Event


class KeyOrder:
    """The queues of all keys. For use from one event loop."""

    def __init__(self) -> None:
        self._last: dict[bytes, asyncio.Event] = {}

    def enqueue(self, keys: Iterable[bytes]) -> KeyTicket:
        """Add a message to the end of the queue of each of these keys."""
        queued, released = frozenset(keys), asyncio.Event()
        earlier = tuple(self._last[key] for key in queued if key in self._last)
        self._last.update(dict.fromkeys(queued, released))
        return KeyTicket(queued, earlier, released)

    async def wait(self, ticket: KeyTicket) -> None:
        """Wait until every earlier message with one of the keys is released."""
        for event in ticket.earlier:
            await event.wait()

    def release(self, ticket: KeyTicket) -> None:
        """Let the next messages with these keys start."""
        ticket.released.set()
        for key in ticket.keys:
            if self._last.get(key) is ticket.released:
                del self._last[key]


@dataclass(slots=True, eq=False)
class ReceivedEvent:
    """One S3 event that this member has received and not settled."""

    entry: ParsedSubmission
    received_at_s: float
    is_eligible: Callable[[], bool]
    """Whether it may be judged in the turn of an earlier event."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the event is judged, so that it is judged once."""
    is_waiting: bool = True
    """Whether it was neither judged nor removed."""
    result: ModerationResult | Unjudgeable | None = None
    """The result of an event that was judged in the turn of an earlier one."""


@dataclass(frozen=True, slots=True)
class _JudgedEvent:
    sequencer: str
    version_id: str | None
    """The version that the event names. None: the present object was judged."""
    etag: str | None
    began_at_s: float


class LatestEvents:
    """The S3 events of each object that this member has received or judged, in the order of S3's own sequencers.

    Everyone who can write to the stream can make up an event with a high sequencer. So an event supersedes earlier
    ones only once its object was judged, and only if that object cannot be older than theirs.
    """

    def __init__(self) -> None:
        self._received: dict[str, list[ReceivedEvent]] = {}
        self._judged: OrderedDict[str, _JudgedEvent] = OrderedDict()

    def add(self, event: ReceivedEvent) -> None:
        """Add an event that was received."""
        insort(self._received.setdefault(event.entry.submission.uri, []), event, key=_order)

    def remove(self, event: ReceivedEvent) -> None:
        """Remove an event that cannot be judged in the turn of an earlier one any more. Safe to repeat."""
        uri = event.entry.submission.uri
        event.is_waiting = False
        received = self._received.get(uri, [])
        while received and not received[-1].is_waiting:
            received.pop()
        if not received:
            self._received.pop(uri, None)

    def find_later(self, event: ReceivedEvent) -> ReceivedEvent | None:
        """Return the last received event of the same object that comes after this one and may be judged first."""
        for other in reversed(self._received.get(event.entry.submission.uri, ())):
            if _order(other) <= _order(event):
                return None
            if other.is_waiting and other.is_eligible():
                return other
        return None

    def mark_judged(self, entry: ParsedSubmission, etag: str | None, began_at_s: float) -> None:
        """Remember that the object of an event was judged. `began_at_s` is not later than its fetch."""
        uri = entry.submission.uri
        assert entry.sequencer is not None
        judged = _JudgedEvent(entry.sequencer, entry.submission.version_id, etag, began_at_s)
        known = self._judged.pop(uri, judged)
        self._judged[uri] = judged if not is_before(judged.sequencer, known.sequencer) else known
        if len(self._judged) > _MAX_OBJECTS:
            self._judged.popitem(last=False)

    def has_judged_later(self, entry: ParsedSubmission) -> bool:
        """Return whether a later event of the same object was judged. Its object may still be an older one."""
        judged = self._judged.get(entry.submission.uri)
        return entry.sequencer is not None and judged is not None and is_before(entry.sequencer, judged.sequencer)

    def is_superseded(self, event: ReceivedEvent) -> bool:
        """Return whether a later event of the same object was judged, by an object that is certainly not older."""
        if not self.has_judged_later(event.entry):
            return False
        submission = event.entry.submission
        judged = self._judged[submission.uri]
        if submission.version_id is not None:
            return judged.version_id == submission.version_id
        if judged.version_id is None and judged.began_at_s >= event.received_at_s:
            return True  # the object was written before its event was received
        return judged.etag is not None and submission.etag == judged.etag

    def is_superseded_unless_current(self, event: ReceivedEvent) -> bool:
        """Return whether a later event was judged, and this one names a version, which may still be the present one.

        A made-up event can name an old version of the object.
        """
        return event.entry.submission.version_id is not None and self.has_judged_later(event.entry)


def _order(event: ReceivedEvent) -> str:
    """The order of `is_before`: a shorter sequencer is padded with zeros."""
    return (event.entry.sequencer or "").upper().rstrip("0")

"""Order by key: messages that share a key are processed one after the other, and all others at the same time."""

import asyncio
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

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


class LatestEvents:
    """The latest S3 event of each object that this member has received, by S3's own sequencers."""

    def __init__(self) -> None:
        self._latest: OrderedDict[str, str] = OrderedDict()

    def add(self, entry: ParsedSubmission) -> None:
        """Remember an S3 event; a submission without a sequencer is ignored."""
        uri, sequencer = entry.submission.uri, entry.sequencer
        if sequencer is None:
            return
        latest = self._latest.pop(uri, sequencer)
        self._latest[uri] = sequencer if is_before(latest, sequencer) else latest
        if len(self._latest) > _MAX_OBJECTS:
            self._latest.popitem(last=False)

    def is_superseded(self, entry: ParsedSubmission) -> bool:
        """Return whether a later event of the same object was received."""
        latest = self._latest.get(entry.submission.uri)
        return entry.sequencer is not None and latest is not None and is_before(entry.sequencer, latest)

"""Whose turn it is: messages that share a key are worked on one after the other, all others at once."""

import asyncio
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from services.streams.parsing import ParsedSubmission, is_before

_REMEMBERED: Final = 10_000


@dataclass(frozen=True, slots=True)
class Turn:
    """One message's place in the line of each of its keys."""

    keys: frozenset[bytes]
    before: tuple[asyncio.Event, ...]
    ended: asyncio.Event

    async def comes(self) -> None:
        """Wait until every earlier message with one of the keys has ended."""
        for event in self.before:
            await event.wait()


class Turns:
    """The lines of all keys. For use from one event loop."""

    def __init__(self) -> None:
        self._last: dict[bytes, asyncio.Event] = {}

    def join(self, keys: Iterable[bytes]) -> Turn:
        """Stand in line for these keys, behind everyone who joined before."""
        joined, ended = frozenset(keys), asyncio.Event()
        before = tuple(self._last[key] for key in joined if key in self._last)
        self._last.update(dict.fromkeys(joined, ended))
        return Turn(joined, before, ended)

    def end(self, turn: Turn) -> None:
        """Let those behind go on."""
        turn.ended.set()
        for key in turn.keys:
            if self._last.get(key) is turn.ended:
                del self._last[key]


class NewestEvents:
    """The newest S3 event of each object that this member has received, by S3's own sequencers."""

    def __init__(self) -> None:
        self._newest: OrderedDict[str, str] = OrderedDict()

    def add(self, entry: ParsedSubmission) -> None:
        """Take notice of an event; anything else is ignored."""
        uri, sequencer = entry.submission.uri, entry.sequencer
        if sequencer is None:
            return
        newest = self._newest.pop(uri, sequencer)
        self._newest[uri] = sequencer if is_before(newest, sequencer) else newest
        if len(self._newest) > _REMEMBERED:
            self._newest.popitem(last=False)

    def has_overtaken(self, entry: ParsedSubmission) -> bool:
        """Whether a later event of the same object was received."""
        newest = self._newest.get(entry.submission.uri)
        return entry.sequencer is not None and newest is not None and is_before(entry.sequencer, newest)

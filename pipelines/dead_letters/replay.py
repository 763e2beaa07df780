"""Dead letters: what they say, and how they go back on the stream that they came from, each once.

A dead letter is never removed or changed. That it went back is remembered twice:

- The replayed submission says so itself: its header `sluice-replayed-from` names the dead letter. It is published in
  one act with what it says, so a crash at any moment leaves both or neither, and every replay looks for these headers
  first. A submission counts as the replay of a dead letter only if its value is the dead letter's, so that no producer
  can keep one from being replayed by naming it.
- Redis keeps a mark for each, because the streams drop old submissions long before the last dead letter is gone.

Either alone would do for most days: the header alone forgets with the retention of the submissions, a mark alone is
wrong when the command dies between it and the publication. A lease in Redis keeps two commands from replaying at the
same time. If Redis loses its data, the headers still say what was replayed within the retention.
"""

import hashlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from pipelines.dead_letters.replay_log import ReplayLog
from pipelines.reporting.text import escape_control_chars
from services.core.errors import ConfigurationError, DeadLetterReason
from services.core.messages import ATTEMPTS, REPLAYED_FROM, DeadLetter, Submission, producer_headers
from services.core.settings import Settings
from services.streams.base import Message, OutgoingMessage, Publisher, Reader
from services.streams.config import StreamConfig
from services.streams.factory import open_publisher, open_reader
from services.streams.parsing import InvalidMessage, ParsedSubmission, parse

_BATCH: Final = 100
_BATCH_BYTES: Final = 256 << 10
"""A dead letter that is larger goes alone, so that it is known which one a stream refuses."""

_CLOCKS: Final = timedelta(hours=1)
"""Far more than the clocks of two machines differ by."""


@dataclass(frozen=True, slots=True)
class StoredDeadLetter:
    """A dead letter on its stream."""

    letter: DeadLetter
    message: Message
    """Its value, key and `producer_headers` are the original's."""
    entries: Sequence[ParsedSubmission | InvalidMessage]
    """What the original bytes say, written by whoever submitted them. More than one stand for a message that was given
    up as a whole."""

    @property
    def submission(self) -> Submission | None:
        """The one that the original bytes say, where they say one."""
        only = self.entries[0] if len(self.entries) == 1 else None
        return only.submission if isinstance(only, ParsedSubmission) else None

    @property
    def submission_id(self) -> str | None:
        """As the headers have it, else the original."""
        return self.letter.submission_id or (self.submission.id if self.submission else None)

    @property
    def tenant(self) -> str | None:
        return self.submission.tenant if self.submission else None

    @property
    def uri(self) -> str | None:
        return self.submission.uri if self.submission else None

    def to_json(self) -> str:
        """One JSON object on one line; `dead_letter` says where it stands, `source` where the submission stood."""
        headers = self.letter.model_dump(mode="json", by_alias=False)
        return json.dumps(
            {"dead_letter": self.message.source}
            | headers
            | {"submission_id": self.submission_id, "tenant": self.tenant, "uri": self.uri}
        )

    def line(self) -> str:
        """For people: when, why, how often tried, whose, what, where from, and the detail."""
        letter = self.letter
        parts = (
            f"{letter.failed_at:%Y-%m-%d %H:%M:%S}Z",
            f"{letter.reason:<14}",
            f"x{letter.attempts}",
            self.submission_id or "-",
            self.tenant or "-",
            self.uri or "-",
            letter.source,
            letter.detail,
        )
        return escape_control_chars("  ".join(parts))


@dataclass(frozen=True, slots=True)
class Selection:
    """Which dead letters are meant; everything that is not set is no condition."""

    reasons: Collection[DeadLetterReason] = ()
    tenant: str | None = None
    older_than: datetime | None = None
    newer_than: datetime | None = None
    ids: Collection[str] = ()

    def takes(self, found: StoredDeadLetter) -> bool:
        """Whether every condition holds."""
        failed_at = found.letter.failed_at
        return (
            (not self.reasons or found.letter.reason in self.reasons)
            and (self.tenant is None or found.tenant == self.tenant)
            and (self.older_than is None or failed_at < self.older_than)
            and (self.newer_than is None or failed_at > self.newer_than)
            and (not self.ids or found.submission_id in self.ids)
        )


@dataclass(slots=True)
class Replayed:
    """What came of a replay; numbers of dead letters."""

    replayed: int = 0
    before: int = 0
    """Selected, but replayed by an earlier command."""
    refused: int = 0
    """The stream does not take them."""


def read_letter(message: Message) -> StoredDeadLetter | None:
    """The dead letter in a message of its stream, or None when Sluice did not write it. Never raises."""
    try:
        letter = DeadLetter.from_headers(message.headers)
    except (ArithmeticError, ValueError):
        return None
    original = Message(
        value=message.value,
        key=message.key,
        headers=producer_headers(message.headers),
        source=letter.source,
        timestamp=message.timestamp,
    )
    return StoredDeadLetter(letter, message, parse(original))


async def select(
    reader: Reader, settings: Settings, selection: Selection, on_foreign: Callable[[Message], None] = lambda _: None
) -> AsyncIterator[StoredDeadLetter]:
    """The selected dead letters on the stream, oldest first; `on_foreign` gets the messages that are none.

    Raises:
        StreamUnavailable: the stream does not answer.
    """
    async for message in reader.read(settings.dead_letters_stream, follow=False):
        found = read_letter(message)
        if found is None:
            on_foreign(message)
        elif selection.takes(found):
            yield found


async def print_letters(
    settings: Settings,
    selection: Selection,
    *,
    write: Callable[[StoredDeadLetter], None],
    progress: Callable[[str], None],
) -> None:
    """Write the selected dead letters, oldest first.

    Raises:
        StreamUnavailable: the stream does not answer.
    """
    foreign = 0

    def count(_: Message) -> None:
        nonlocal foreign
        foreign += 1

    reader = await open_reader(StreamConfig.from_settings(settings))
    try:
        async for found in select(reader, settings, selection, count):
            write(found)
    finally:
        await reader.close()
    if foreign:
        progress(f"{foreign} messages on {settings.dead_letters_stream} are not dead letters of Sluice, left out")


async def replay(
    settings: Settings,
    selection: Selection,
    *,
    limit: int | None,
    dry_run: bool,
    write: Callable[[StoredDeadLetter], None],
    progress: Callable[[str], None],
) -> Replayed:
    """Put the selected dead letters back, oldest first, at most `limit`; `write` gets each that is durably back.

    With `dry_run` nothing is published, and `write` gets those that would be.

    Raises:
        ConfigurationError: an id in the selection belongs to no dead letter (then nothing is replayed), or a stream
            refuses what is put back.
        Unavailable: the stream or Redis does not answer. Nothing is lost: what was put back is known next time.
    """
    async with AsyncExitStack() as closing:
        reader = await open_reader(StreamConfig.from_settings(settings))
        closing.push_async_callback(reader.close)
        replay_log = await closing.enter_async_context(ReplayLog(settings, lease=not dry_run, progress=progress))
        candidates = await _candidates(reader, settings, selection)
        known = await replay_log.contains(candidates.marks.values())
        if len(known) < len(set(candidates.marks.values())):
            progress("looking for what was replayed before")
            known |= await _already_replayed(reader, settings, candidates)
        done = Replayed()
        publisher: Publisher | None = None
        if not dry_run:
            publisher = await open_publisher(StreamConfig.from_settings(settings))
            closing.push_async_callback(publisher.close)
            await replay_log.add(known)
        async with aclosing(_not_yet_replayed(reader, settings, selection, candidates, known, done, limit)) as due:
            async for batch in _batched(due):
                if publisher:
                    await replay_log.renew()
                    if not await _publish(publisher, batch, settings, progress):
                        done.refused += 1
                        continue
                    await replay_log.add(replay_id(found) for found in batch)
                done.replayed += len(batch)
                for found in batch:
                    write(found)
        return done


def record_of(found: StoredDeadLetter, settings: Settings) -> OutgoingMessage:
    """The original submission again, saying where it was and how often it was tried."""
    letter = found.letter
    came_from = letter.source.partition("/")[0]
    own = ((REPLAYED_FROM, found.message.source.encode()), (ATTEMPTS, str(max(0, letter.attempts)).encode()))
    return OutgoingMessage(
        settings.backfill_stream if came_from == settings.backfill_stream else settings.submissions_stream,
        found.message.value,
        found.message.key,
        (*own, *producer_headers(found.message.headers)),
    )


def replay_id(found: StoredDeadLetter) -> bytes:
    """What Redis remembers of a dead letter. A stream that is made anew uses its positions again, hence the time."""
    return _digest(found.message.source, found.letter.failed_at.isoformat(), value=found.message.value)


def _digest(*texts: str, value: bytes) -> bytes:
    return hashlib.blake2b(json.dumps(texts).encode() + value, digest_size=16).digest()


@dataclass(slots=True)
class _Candidates:
    marks: dict[bytes, bytes] = field(default_factory=dict)
    """By what a submission shows that is the dead letter's replay: its position and its value."""
    oldest: datetime | None = None


async def _candidates(reader: Reader, settings: Settings, selection: Selection) -> _Candidates:
    candidates = _Candidates()
    missing = set(selection.ids)
    async for found in select(reader, settings, selection):
        message = found.message
        missing.discard(found.submission_id or "")
        candidates.marks[_digest(message.source, value=message.value)] = replay_id(found)
        candidates.oldest = min(candidates.oldest or message.timestamp, message.timestamp)
    if missing:
        names = ", ".join(escape_control_chars(each) for each in sorted(missing))
        raise ConfigurationError(
            f"no dead letter that is selected belongs to {names}; nothing was replayed, and `sluice dead-letters list` "
            "shows those that there are"
        )
    return candidates


async def _already_replayed(reader: Reader, settings: Settings, candidates: _Candidates) -> set[bytes]:
    """The marks of those candidates whose replay is on a stream of submissions."""
    found: set[bytes] = set()
    since = candidates.oldest - _CLOCKS if candidates.oldest else None
    for stream in submission_streams(settings):
        async for message in reader.read(stream, follow=False, since=since):
            position = message.header(REPLAYED_FROM)
            if position is not None:
                mark = candidates.marks.get(_digest(position.decode(errors="replace"), value=message.value))
                found |= {mark} if mark else set()
    return found


def submission_streams(settings: Settings) -> Sequence[str]:
    """Where submissions come in."""
    return [stream for stream in (settings.submissions_stream, settings.backfill_stream) if stream]


async def _not_yet_replayed(
    reader: Reader,
    settings: Settings,
    selection: Selection,
    candidates: _Candidates,
    known: Collection[bytes],
    done: Replayed,
    limit: int | None,
) -> AsyncGenerator[StoredDeadLetter, None]:
    """Those candidates that were not replayed, at most `limit`. A dead letter newer than the look-up is none."""
    wanted = set(candidates.marks.values())
    left = limit
    async for found in select(reader, settings, selection):
        mark = replay_id(found)
        if mark in known:
            done.before += 1
        elif mark in wanted and left != 0:
            left = None if left is None else left - 1
            yield found


async def _batched(due: AsyncIterator[StoredDeadLetter]) -> AsyncIterator[list[StoredDeadLetter]]:
    batch: list[StoredDeadLetter] = []
    size = 0
    async for found in due:
        more = len(found.message.value)
        if batch and (len(batch) == _BATCH or size + more > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(found)
        size += more
    if batch:
        yield batch


async def _publish(
    publisher: Publisher, batch: Sequence[StoredDeadLetter], settings: Settings, progress: Callable[[str], None]
) -> bool:
    """Whether the batch is on its stream; False when that refuses its only record."""
    try:
        await publisher.publish([record_of(found, settings) for found in batch])
    except ConfigurationError as error:
        if len(batch) > 1:
            raise
        progress(escape_control_chars(f"{batch[0].message.source} is not replayed: {error}"))
        return False
    return True

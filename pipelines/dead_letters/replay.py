"""Replay each dead letter once onto the stream that it came from.

A dead letter is never removed or changed. A replay is recorded twice:

- On the stream. The header `sluice-replayed-from` of the replayed submission names the dead letter. Header and
  submission are published in one act, so a crash at any moment leaves both or neither. Every replay looks for these
  headers first. A submission counts as a replay only if its value, its key and its other headers equal those of the
  dead letter. A producer that sets the header therefore cannot prevent a replay: an equal submission is judged as the
  replay would be.
- In Redis. The replay log outlives the submissions, which the streams drop long before the last dead letter.

Neither is enough alone: the headers disappear with the retention of the submissions, and the log is wrong if the
command dies between publication and its entry in the log. A lease in Redis keeps two commands from replaying at the
same time. If Redis loses its data, the headers still prevent repeats within the retention.
"""

import hashlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from pipelines.dead_letters.replay_log import ReplayLog
from pipelines.dead_letters.stored import Selection, StoredDeadLetter, select
from services.core.errors import ConfigurationError
from services.core.messages import ATTEMPTS_HEADER, REPLAYED_FROM_HEADER, remove_own_headers
from services.core.settings import Settings
from services.core.text import escape_control_chars
from services.streams.base import Message, OutgoingMessage, Publisher, Reader
from services.streams.config import StreamConfig, list_submission_streams
from services.streams.factory import open_publisher, open_reader

_BATCH_SIZE: Final = 100
_BATCH_BYTES: Final = 256 << 10
"""A larger dead letter is published alone, so that an error of the stream names the message that it refuses."""

_MAX_CLOCK_SKEW: Final = timedelta(hours=1)
"""Far more than the clocks of two machines differ by."""


@dataclass(slots=True)
class ReplayCounts:
    """Numbers of selected dead letters, by result."""

    replayed: int = 0
    already_replayed: int = 0
    """Skipped, because an earlier command replayed them."""
    refused: int = 0
    """Not replayed, because the stream refuses them, for example as too large."""


async def replay(
    settings: Settings,
    selection: Selection,
    *,
    limit: int | None,
    dry_run: bool,
    write: Callable[[StoredDeadLetter], None],
    progress: Callable[[str], None],
) -> ReplayCounts:
    """Replay the selected dead letters, oldest first, at most `limit`. Call `write` with each one once it is durable.

    With `dry_run`, nothing is published, and `write` gets the dead letters that would be replayed.

    Raises:
        ConfigurationError: an id in the selection belongs to no dead letter (then nothing is replayed), or the stream
            refuses a batch.
        Unavailable: the stream or Redis does not answer. The next command continues: it recognizes finished replays.
    """
    async with AsyncExitStack() as closing:
        reader = await open_reader(StreamConfig.from_settings(settings))
        closing.push_async_callback(reader.close)
        replay_log = await closing.enter_async_context(ReplayLog(settings, lease=not dry_run, progress=progress))
        candidates = await _find_candidates(reader, settings, selection)
        already_replayed = await replay_log.contains(candidates.replay_ids)
        if len(already_replayed) < len(candidates.replay_ids):
            progress("looking for earlier replays on the streams of submissions")
            already_replayed |= await _find_replays(reader, settings, candidates)
        counts = ReplayCounts()
        publisher: Publisher | None = None
        if not dry_run:
            publisher = await open_publisher(StreamConfig.from_settings(settings))
            closing.push_async_callback(publisher.close)
            await replay_log.add(already_replayed)
        remaining = _select_not_replayed(reader, settings, selection, candidates, already_replayed, counts, limit)
        async with aclosing(remaining) as to_replay:
            async for batch in _batch(to_replay):
                if publisher:
                    await replay_log.renew()
                    await replay_log.record_attempts(
                        {(each.message.source, each.message.value): each.letter.attempts for each in batch}
                    )
                    if not await _publish(publisher, batch, settings, progress):
                        counts.refused += 1
                        continue
                    await replay_log.add(replay_id(stored) for stored in batch)
                counts.replayed += len(batch)
                for stored in batch:
                    write(stored)
        return counts


def replay_message(stored: StoredDeadLetter, settings: Settings) -> OutgoingMessage:
    """The original message, with headers for the position of the dead letter and for the earlier attempts."""
    letter = stored.letter
    came_from = letter.source.partition("/")[0]
    added = (
        (REPLAYED_FROM_HEADER, stored.message.source.encode()),
        (ATTEMPTS_HEADER, str(max(0, letter.attempts)).encode()),
    )
    return OutgoingMessage(
        settings.backfill_stream if came_from == settings.backfill_stream else settings.submissions_stream,
        stored.message.value,
        stored.message.key,
        (*added, *remove_own_headers(stored.message.headers)),
    )


def replay_id(stored: StoredDeadLetter) -> bytes:
    """The id of a dead letter in the replay log. It has the time, because a recreated stream reuses positions."""
    return _digest(stored.message.source, stored.letter.failed_at.isoformat(), value=stored.message.value)


def _digest_submission(position: str, message: Message) -> bytes:
    """A digest of the position of a dead letter and of all that its replay has from the original message."""
    key = None if message.key is None else message.key.hex()
    headers = [f"{name}={value.hex()}" for name, value in remove_own_headers(message.headers)]
    return _digest(position, json.dumps([key, headers]), value=message.value)


def _digest(*texts: str, value: bytes) -> bytes:
    return hashlib.blake2b(json.dumps(texts).encode() + value, digest_size=16).digest()


@dataclass(slots=True)
class _Candidates:
    """The selected dead letters. Each has two digests, because a replayed submission does not say when it failed."""

    replay_ids_by_message: dict[bytes, bytes] = field(default_factory=dict)
    """Replay ids by `_digest_submission`. A header of the replayed submission has the position."""
    oldest_at: datetime | None = None
    """When the oldest one was published."""

    @property
    def replay_ids(self) -> Collection[bytes]:
        """The ids in the replay log."""
        return set(self.replay_ids_by_message.values())


async def _find_candidates(reader: Reader, settings: Settings, selection: Selection) -> _Candidates:
    candidates = _Candidates()
    missing = set(selection.ids)
    async for stored in select(reader, settings, selection):
        message = stored.message
        missing.discard(stored.submission_id or "")
        candidates.replay_ids_by_message[_digest_submission(message.source, message)] = replay_id(stored)
        candidates.oldest_at = min(candidates.oldest_at or message.timestamp, message.timestamp)
    if missing:
        names = ", ".join(escape_control_chars(each) for each in sorted(missing))
        raise ConfigurationError(
            f"no selected dead letter belongs to {names}; nothing was replayed. `sluice dead-letters list` shows the "
            "existing ones"
        )
    return candidates


async def _find_replays(reader: Reader, settings: Settings, candidates: _Candidates) -> set[bytes]:
    """The replay ids of the candidates whose replay is on a stream of submissions."""
    replayed: set[bytes] = set()
    since = candidates.oldest_at - _MAX_CLOCK_SKEW if candidates.oldest_at else None
    for stream in list_submission_streams(settings):
        async for message in reader.read(stream, follow=False, since=since):
            position = message.header(REPLAYED_FROM_HEADER)
            if position is not None:
                digest = _digest_submission(position.decode(errors="replace"), message)
                if digest in candidates.replay_ids_by_message:
                    replayed.add(candidates.replay_ids_by_message[digest])
    return replayed


async def _select_not_replayed(
    reader: Reader,
    settings: Settings,
    selection: Selection,
    candidates: _Candidates,
    already_replayed: Collection[bytes],
    counts: ReplayCounts,
    limit: int | None,
) -> AsyncGenerator[StoredDeadLetter, None]:
    """Yield the candidates that were not replayed, at most `limit`.

    A dead letter that arrived after the candidates were collected is skipped.
    """
    candidate_ids = candidates.replay_ids
    remaining = limit
    async for stored in select(reader, settings, selection):
        own_id = replay_id(stored)
        if own_id in already_replayed:
            counts.already_replayed += 1
        elif own_id in candidate_ids and remaining != 0:
            remaining = None if remaining is None else remaining - 1
            yield stored


async def _batch(to_replay: AsyncIterator[StoredDeadLetter]) -> AsyncIterator[list[StoredDeadLetter]]:
    batch: list[StoredDeadLetter] = []
    batch_bytes = 0
    async for stored in to_replay:
        value_bytes = len(stored.message.value)
        if batch and (len(batch) == _BATCH_SIZE or batch_bytes + value_bytes > _BATCH_BYTES):
            yield batch
            batch, batch_bytes = [], 0
        batch.append(stored)
        batch_bytes += value_bytes
    if batch:
        yield batch


async def _publish(
    publisher: Publisher, batch: Sequence[StoredDeadLetter], settings: Settings, progress: Callable[[str], None]
) -> bool:
    """Publish a batch. False if the stream refuses the only message of the batch."""
    try:
        await publisher.publish([replay_message(stored, settings) for stored in batch])
    except ConfigurationError as error:
        if len(batch) > 1:
            raise
        progress(escape_control_chars(f"did not replay {batch[0].message.source}: {error}"))
        return False
    return True

"""Dead letters on their stream: parse, select and list them."""

import json
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime

from services.core.errors import DeadLetterReason
from services.core.messages import DeadLetter, Submission, remove_own_headers
from services.core.settings import Settings
from services.core.tenancy import NOT_SEPARATED, Tenancy
from services.core.text import escape_control_chars
from services.streams.base import Message, Reader
from services.streams.config import StreamConfig
from services.streams.factory import open_reader
from services.streams.parsing import InvalidMessage, ParsedSubmission, parse


@dataclass(frozen=True, slots=True)
class StoredDeadLetter:
    """A dead letter on its stream."""

    letter: DeadLetter
    message: Message
    """The message on the dead-letter stream. Value, key and `remove_own_headers` are those of the original message."""
    entries: Sequence[ParsedSubmission | InvalidMessage]
    """The entries of the original message: untrusted input. Several, if the whole message was abandoned."""

    @property
    def submission(self) -> Submission | None:
        """The submission in the original message, if it has exactly one valid entry."""
        only = self.entries[0] if len(self.entries) == 1 else None
        return only.submission if isinstance(only, ParsedSubmission) else None

    @property
    def submission_id(self) -> str | None:
        """From the headers, else from the original message."""
        return self.letter.submission_id or (self.submission.id if self.submission else None)

    @property
    def tenant(self) -> str | None:
        return self.submission.tenant if self.submission else None

    @property
    def uri(self) -> str | None:
        return self.submission.uri if self.submission else None

    def to_json(self) -> str:
        """One JSON object on one line. `dead_letter` is its position, `source` the position of the submission."""
        headers = self.letter.model_dump(mode="json", by_alias=False)
        return json.dumps(
            {"dead_letter": self.message.source}
            | headers
            | {"submission_id": self.submission_id, "tenant": self.tenant, "uri": self.uri}
        )

    def line(self) -> str:
        """One line for a terminal: time, reason, attempts, submission id, tenant, uri, source, detail."""
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
    """Conditions on dead letters. All of them must hold; a field that is not set is no condition."""

    reasons: Collection[DeadLetterReason] = ()
    tenant: str | None = None
    older_than: datetime | None = None
    newer_than: datetime | None = None
    ids: Collection[str] = ()

    def matches(self, stored: StoredDeadLetter) -> bool:
        """Whether every condition holds for the dead letter."""
        failed_at = stored.letter.failed_at
        return (
            (not self.reasons or stored.letter.reason in self.reasons)
            and (self.tenant is None or stored.tenant == self.tenant)
            and (self.older_than is None or failed_at < self.older_than)
            and (self.newer_than is None or failed_at > self.newer_than)
            and (not self.ids or stored.submission_id in self.ids)
        )


def parse_dead_letter(message: Message, tenancy: Tenancy = NOT_SEPARATED) -> StoredDeadLetter | None:
    """Parse a message of the dead-letter stream; None if Sluice did not write it. Never raises.

    `tenancy` says which tenant has the object of an S3 event.
    """
    try:
        letter = DeadLetter.from_headers(message.headers)
    except (ArithmeticError, ValueError):
        return None
    original = Message(
        value=message.value,
        key=message.key,
        headers=remove_own_headers(message.headers),
        source=letter.source,
        timestamp=message.timestamp,
    )
    return StoredDeadLetter(letter, message, parse(original, tenancy))


async def select(
    reader: Reader,
    settings: Settings,
    selection: Selection,
    on_other_message: Callable[[Message], None] = lambda _: None,
) -> AsyncIterator[StoredDeadLetter]:
    """Yield the selected dead letters, oldest first. Call `on_other_message` with messages that are no dead letters.

    Raises:
        StreamUnavailable: the stream does not answer.
    """
    tenancy = Tenancy(settings.tenant_prefixes, settings.tenant_policies)
    async for message in reader.read(settings.dead_letters_stream, follow=False):
        stored = parse_dead_letter(message, tenancy)
        if stored is None:
            on_other_message(message)
        elif selection.matches(stored):
            yield stored


async def list_dead_letters(
    settings: Settings,
    selection: Selection,
    *,
    write: Callable[[StoredDeadLetter], None],
    progress: Callable[[str], None],
) -> None:
    """Call `write` with each selected dead letter, oldest first.

    Raises:
        StreamUnavailable: the stream does not answer.
    """
    others = 0

    def count(_: Message) -> None:
        nonlocal others
        others += 1

    reader = await open_reader(StreamConfig.from_settings(settings))
    try:
        async for stored in select(reader, settings, selection, count):
            write(stored)
    finally:
        await reader.close()
    if others:
        progress(f"skipped {others} messages on {settings.dead_letters_stream} that Sluice did not write")

"""`sluice reconcile`: reads what was submitted and what came of it, and says what has no end, or more than one.

Verdicts and dead letters are read first, then submissions, then what came in the meantime: whatever was read first
belongs to a submission that is read, so a running service causes no false findings, and no clocks are compared.
"""

import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from pipelines.dead_letters.replay import read_letter, submission_streams
from pipelines.reconciliation.matching import ReconciledSubmission, SeenSubmission, SubmissionOutcome, match
from pipelines.reconciliation.spool import SpoolDatabase
from pipelines.reporting.text import escape_control_chars
from services.core.errors import Malformed, SluiceError
from services.core.messages import decode_json
from services.core.settings import Settings
from services.streams.base import Message, Reader
from services.streams.config import StreamConfig
from services.streams.factory import open_reader
from services.streams.parsing import InvalidMessage, ParsedSubmission, parse

_MARGIN: Final = timedelta(hours=1)
"""Submissions from before the range explain ends that came in it."""
_CLOCKS: Final = timedelta(minutes=10)
"""Far more than producers' clocks differ by; what is read twice because of it is passed over."""
_DIGITS: Final = 20
_NEEDED: Final = {"submission_id", "uri", "verdict_id", "outcome"}
"""What of a verdict is read."""
_NAMED: Final = 10
"""Ends of one submission that a finding names."""


@dataclass(frozen=True, slots=True)
class Span:
    """The submissions that are reconciled, by when they were published: `since` <= t <= `until`."""

    since: datetime | None = None
    until: datetime | None = None

    def holds(self, moment: datetime) -> bool:
        """Whether a time lies in it."""
        return (self.since is None or moment >= self.since) and (self.until is None or moment <= self.until)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be."""

    finding: str
    """lost, repeats, conflicting, unexplained, or unreadable (on the stream of verdicts, but no verdict)."""
    submission_id: str | None
    uri: str | None
    source: str | None
    """Where a lost submission, or an unexplained end, stands."""
    published_at: str | None
    count: int
    """Ends too many; else 1."""
    ends: tuple[str, ...] = ()

    def to_json(self) -> str:
        """One JSON object on one line."""
        return json.dumps(asdict(self))

    def line(self) -> str:
        """For people."""
        parts = (f"{self.finding:<11}", self.submission_id or "-", self.uri or "-", self.source, self.published_at)
        named = ", ".join(self.ends)
        return escape_control_chars("  ".join([*(part for part in parts if part), *([named] if named else [])]))


@dataclass(slots=True)
class ReconciliationReport:
    """What there is in the range, in numbers."""

    submissions: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    """By outcome."""
    dead_letters: Counter[str] = field(default_factory=Counter)
    """By reason."""
    lost: int = 0
    in_flight: int = 0
    repeats: int = 0
    conflicting: int = 0
    unexplained: int = 0
    outside: int = 0
    """Ends without a submission in the range that may well belong to one outside of it."""
    ignored: int = 0
    """Messages that ask for nothing, such as deletions."""

    def to_json(self) -> str:
        """One JSON object on one line."""
        # Not asdict, which cannot copy a Counter.
        return json.dumps({"finding": "account"} | {name: getattr(self, name) for name in self.__slots__})

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"submissions   {self.submissions:>12,}{f'  and {self.ignored:,} ignored events' if self.ignored else ''}",
            f"verdicts      {self.verdicts.total():>12,}  {_by_kind(self.verdicts)}".rstrip(),
            f"dead letters  {self.dead_letters.total():>12,}  {_by_kind(self.dead_letters)}".rstrip(),
            f"lost {self.lost:,}, in flight {self.in_flight:,}, conflicting {self.conflicting:,}, "
            f"repeats {self.repeats:,}, unexplained {self.unexplained:,}, outside of the range {self.outside:,}",
        ]

    def wrong(self, *, exactly_once: bool) -> str | None:
        """The sentence that says what does not add up; None when every submission has exactly one end."""
        found = [
            f"{count:,} {what}"
            for count, what in (
                (self.lost, "submissions have no end"),
                (self.conflicting, "ends contradict another end of the same submission"),
                (self.repeats if exactly_once else 0, "ends are repeated in spite of SLUICE_DELIVERY=exactly_once"),
            )
            if count
        ]
        return ", and ".join(found) or None


async def reconcile(
    settings: Settings,
    span: Span,
    *,
    settle_s: float,
    write: Callable[[Finding], None],
    progress: Callable[[str], None],
) -> ReconciliationReport:
    """Match every submission of a time range with its ends; `write` gets each finding.

    Args:
        settle_s: a submission without an end counts as lost from this age on, in seconds.

    Raises:
        StreamUnavailable: the stream does not answer.
        SluiceError: there is no room for the temporary file.
    """
    account = ReconciliationReport()
    settled_before = datetime.now(UTC).timestamp() - settle_s
    reader = await open_reader(StreamConfig.from_settings(settings))
    try:
        with SpoolDatabase() as books:
            reading = _Reading(reader, settings, span, books, account, write)
            progress("reading verdicts and dead letters")
            await reading.read_ends(read_first=True)
            progress("reading submissions")
            await reading.read_submissions()
            progress("reading what came in the meantime")
            await reading.read_ends(read_first=False)
            progress("matching")
            for case in match(books.occurrences(), books.ends(), settled_before):
                for finding in _settle(case, account, reading.is_outside):
                    write(finding)
    except sqlite3.Error as error:
        raise SluiceError(f"the temporary file cannot be used ({error}); TMPDIR names where it goes") from error
    finally:
        await reader.close()
    return account


def _settle(
    case: ReconciledSubmission, account: ReconciliationReport, is_outside: Callable[[SubmissionOutcome], bool]
) -> Iterator[Finding]:
    """Add a case to the account; yield what is wrong with it."""
    if not case.occurrences:
        for end in case.ends:
            if is_outside(end):
                account.outside += 1
            else:
                account.unexplained += 1
                yield Finding("unexplained", end.submission_id, end.uri, end.source, _iso(end.at), 1, (_named(end),))
        return
    if not case.counted:
        return
    account.submissions += case.counted
    for end in case.ends:
        (account.dead_letters if end.dead else account.verdicts)[end.kind] += 1
    account.lost += len(case.lost)
    account.in_flight += case.in_flight
    account.repeats += case.repeats
    account.conflicting += case.conflicting
    for occurrence in case.lost:
        yield Finding("lost", occurrence.submission_id, occurrence.uri, occurrence.source, _iso(occurrence.at), 1)
    first = case.occurrences[0]
    named = tuple(dict.fromkeys(_named(end) for end in case.ends))[:_NAMED]
    for what, count in (("repeats", case.repeats), ("conflicting", case.conflicting)):
        if count:
            yield Finding(what, first.submission_id, first.uri, None, None, count, named)


class _Reading:
    """One pass over the streams, into the books."""

    def __init__(
        self,
        reader: Reader,
        settings: Settings,
        span: Span,
        books: SpoolDatabase,
        account: ReconciliationReport,
        write: Callable[[Finding], None],
    ) -> None:
        self._reader = reader
        self._settings = settings
        self._span = span
        self._since = span.since - _MARGIN if span.since else None
        self._books = books
        self._account = account
        self._write = write
        self._begin: datetime | None = None
        """The oldest submission in the range that was read."""
        self._first: dict[str, tuple[int, ...]] = {}
        """Where reading submissions began, by partition."""
        self._last: dict[str, tuple[int, ...]] = {}
        """How far ends were read, by partition."""
        self._newest: dict[str, datetime] = {}
        """Of the ends, by stream."""

    async def read_submissions(self) -> None:
        """Every entry of every message, as an intake parses them."""
        for stream in submission_streams(self._settings):
            async for message in self._reader.read(stream, follow=False, since=self._since):
                line, place = _place(message.source) or (message.source, ())
                self._first[line] = min(self._first.get(line, place), place)
                counted = self._span.holds(message.timestamp)
                if self._begin is None or message.timestamp < self._begin:
                    self._begin = message.timestamp
                entries = parse(message)
                if counted and not entries:
                    self._account.ignored += 1
                for entry in entries:
                    self._books.add_occurrence(_occurrence(entry, message, counted))

    async def read_ends(self, *, read_first: bool) -> None:
        """Verdicts and dead letters; the second time those that came since the first."""
        for stream, read_end in (
            (self._settings.verdicts_stream, self._verdict),
            (self._settings.dead_letters_stream, self._dead_letter),
        ):
            async for message in self._new(stream):
                for end in read_end(message, read_first):
                    self._books.add_end(end)

    async def _new(self, stream: str) -> AsyncIterator[Message]:
        known = dict(self._last)
        newest = self._newest.get(stream)
        since = newest - _CLOCKS if newest else self._since
        async for message in self._reader.read(stream, follow=False, since=since):
            line, place = _place(message.source) or (message.source, ())
            if place > known.get(line, ()):
                self._last[line] = max(self._last.get(line, place), place)
                self._newest[stream] = max(self._newest.get(stream, message.timestamp), message.timestamp)
                yield message

    def _verdict(self, message: Message, read_first: bool) -> Iterator[SubmissionOutcome]:
        try:
            verdict = decode_json(message.value)
        except Malformed:
            verdict = None
        fields = {name: text for name, text in _fields(verdict) if isinstance(text, str)}
        if not fields.keys() >= _NEEDED:
            if read_first and self._span.holds(message.timestamp):
                self._account.unexplained += 1
                self._write(Finding("unreadable", None, None, message.source, _iso(message.timestamp.timestamp()), 1))
            return
        yield SubmissionOutcome(
            key=_key(fields["submission_id"], fields["uri"]),
            identity=fields["verdict_id"],
            kind=fields["outcome"],
            dead=False,
            at=message.timestamp.timestamp(),
            read_first=read_first,
            submission_id=fields["submission_id"],
            uri=fields["uri"],
            source=message.source,
            submitted_at=fields.get("submitted_at"),
        )

    def _dead_letter(self, message: Message, read_first: bool) -> Iterator[SubmissionOutcome]:
        found = read_letter(message)
        if found is None:
            return
        letter = found.letter
        # A malformed one ends what stands where it stood, whatever it says; nothing is known of one without entries.
        for entry in found.entries if letter.reason != "malformed" and found.entries else (None,):
            submission = entry.submission if isinstance(entry, ParsedSubmission) else None
            yield SubmissionOutcome(
                key=_key(submission.id, submission.uri) if submission else _position_key(letter.source),
                identity=f"{letter.source} {letter.reason}",
                kind=letter.reason,
                dead=True,
                at=message.timestamp.timestamp(),
                read_first=read_first,
                submission_id=submission.id if submission else found.submission_id,
                uri=submission.uri if submission else found.uri,
                source=letter.source,
                submitted_at=None,
            )

    def is_outside(self, end: SubmissionOutcome) -> bool:
        """Whether the submission of an end that explains nothing may lie outside of what was read."""
        begin = max(filter(None, (self._span.since, self._begin)), default=None)
        if begin is None or not end.read_first or end.at < begin.timestamp():
            return True
        if self._span.until and end.at > self._span.until.timestamp():
            return True
        if end.dead:
            line, place = _place(end.source) or ("", ())
            return bool(line) and (line not in self._first or place < self._first[line])
        try:
            submitted_at = datetime.fromisoformat(end.submitted_at or "")
            return submitted_at.timestamp() < begin.timestamp()
        except (ValueError, OverflowError):
            return False


def _occurrence(entry: ParsedSubmission | InvalidMessage, message: Message, counted: bool) -> SeenSubmission:
    accepted = entry.submission if isinstance(entry, ParsedSubmission) else None
    return SeenSubmission(
        key=_key(accepted.id, accepted.uri) if accepted else _position_key(message.source),
        at=message.timestamp.timestamp(),
        counted=counted,
        submission_id=accepted.id
        if accepted
        else entry.error.submission_id
        if isinstance(entry, InvalidMessage)
        else None,
        uri=accepted.uri if accepted else None,
        source=message.source,
    )


def _fields(document: Any) -> Iterable[tuple[str, Any]]:
    return document.items() if isinstance(document, dict) else ()


def _key(submission_id: str, uri: str) -> bytes:
    return _hashed(f"id {len(submission_id)} {submission_id}{uri}")


def _position_key(source: str) -> bytes:
    """Of a message, or a part of one, that is no submission: it has no other name than where it stands."""
    return _hashed(f"at {source}")


def _hashed(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


def _place(source: str) -> tuple[str, tuple[int, ...]] | None:
    """Partition, and what orders it there; None where `source` is no position."""
    line, _, last = source.rpartition("/")
    numbers = last.split("-")
    is_position = line and all(each.isdecimal() and len(each) <= _DIGITS for each in numbers)
    return (line, tuple(map(int, numbers))) if is_position else None


def _named(end: SubmissionOutcome) -> str:
    return f"dead letter {end.kind} of {end.source}" if end.dead else f"{end.kind} {end.identity}"


def _by_kind(counts: Counter[str]) -> str:
    return escape_control_chars(", ".join(f"{kind} {count:,}" for kind, count in counts.most_common()))


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

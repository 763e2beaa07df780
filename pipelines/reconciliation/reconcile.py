"""`sluice reconcile`: find submissions that have no outcome, or more than one.

Verdicts and dead letters are read first, then submissions, then the verdicts and dead letters that arrived meanwhile.
An outcome of the first pass therefore always belongs to a submission that is read. A running service causes no false
findings, and no clocks are compared.
"""

import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from pipelines.dead_letters.stored import parse_dead_letter
from pipelines.reconciliation.matching import ReconciledSubmission, SubmissionMessage, SubmissionOutcome, match
from pipelines.reconciliation.spool import SpoolDatabase
from services.core.errors import Malformed, SluiceError
from services.core.messages import decode_json
from services.core.settings import Settings
from services.core.text import escape_control_chars
from services.streams.base import Message, Reader
from services.streams.config import StreamConfig, list_submission_streams
from services.streams.factory import open_reader
from services.streams.parsing import InvalidMessage, ParsedSubmission, parse

_LOOK_BACK: Final = timedelta(hours=1)
"""Submissions from this long before the range are read too: they explain outcomes in the range."""
_MAX_CLOCK_SKEW: Final = timedelta(minutes=10)
"""Far more than the clocks of producers differ by. Messages that are read twice because of it are skipped."""
_MAX_DIGITS: Final = 20
_VERDICT_FIELDS: Final = {"submission_id", "uri", "verdict_id", "outcome"}
"""A message without these fields is no verdict."""
_MAX_NAMED_OUTCOMES: Final = 10
"""How many outcomes of one submission a finding names."""


@dataclass(frozen=True, slots=True)
class TimeRange:
    """The range of submissions to reconcile, by time of publication: `since` <= t <= `until`. None is no limit."""

    since: datetime | None = None
    until: datetime | None = None

    def contains(self, time: datetime) -> bool:
        """Whether the range contains the time."""
        return (self.since is None or time >= self.since) and (self.until is None or time <= self.until)


@dataclass(frozen=True, slots=True)
class Finding:
    """A submission or an outcome that is not as it should be. The fields are those of the JSON output."""

    finding: str
    """lost, repeats, conflicting, unexplained, or unreadable (a message on the verdicts stream that is no verdict). The
    report counts an unreadable message as unexplained."""
    submission_id: str | None
    uri: str | None
    source: str | None
    """The position of a lost submission, of an unexplained verdict, or of an unexplained dead letter's submission."""
    published_at: str | None
    count: int
    """The number of surplus outcomes; 1 for the other findings."""
    ends: tuple[str, ...] = ()
    """Names of the submission's outcomes. The field has had this name since 0.1.0."""

    def to_json(self) -> str:
        """One JSON object on one line."""
        return json.dumps(asdict(self))

    def line(self) -> str:
        """One line of text for a terminal."""
        parts = (f"{self.finding:<11}", self.submission_id or "-", self.uri or "-", self.source, self.published_at)
        outcomes = ", ".join(self.ends)
        return escape_control_chars("  ".join([*(part for part in parts if part), *([outcomes] if outcomes else [])]))


@dataclass(slots=True)
class ReconciliationReport:
    """Counts of the submissions and outcomes in the range. The fields are those of the JSON output."""

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
    """Outcomes without a submission in the range whose submission may be outside the range."""
    ignored: int = 0
    """Messages that submit nothing, such as S3 events of deletions."""

    def to_json(self) -> str:
        """One JSON object on one line."""
        # dataclasses.asdict cannot copy a Counter. The name `account` is that of 0.1.0.
        return json.dumps({"finding": "account"} | {name: getattr(self, name) for name in self.__slots__})

    def lines(self) -> list[str]:
        """Lines of text for a terminal."""
        return [
            f"submissions   {self.submissions:>12,}{f'  and {self.ignored:,} ignored events' if self.ignored else ''}",
            f"verdicts      {self.verdicts.total():>12,}  {_format_by_kind(self.verdicts)}".rstrip(),
            f"dead letters  {self.dead_letters.total():>12,}  {_format_by_kind(self.dead_letters)}".rstrip(),
            f"lost {self.lost:,}, in flight {self.in_flight:,}, conflicting {self.conflicting:,}, "
            f"repeats {self.repeats:,}, unexplained {self.unexplained:,}, outside the range {self.outside:,}",
        ]

    def failure(self, *, exactly_once: bool) -> str | None:
        """A sentence about lost, conflicting and (with `exactly_once`) repeated outcomes; None if there are none."""
        failures = [
            sentence
            for count, sentence in (
                (self.lost, f"{_format_count(self.lost, 'submission')} without an outcome"),
                (
                    self.conflicting,
                    f"{_format_count(self.conflicting, 'outcome')} in conflict with another outcome of the same "
                    "submission",
                ),
                (
                    self.repeats if exactly_once else 0,
                    f"{_format_count(self.repeats, 'repeated outcome')} in spite of SLUICE_DELIVERY=exactly_once "
                    "(check that every member has this setting, and that nothing else publishes verdicts)",
                ),
            )
            if count
        ]
        return f"found {', and '.join(failures)}; the findings name the submissions" if failures else None


async def reconcile(
    settings: Settings,
    time_range: TimeRange,
    *,
    settle_s: float,
    write: Callable[[Finding], None],
    progress: Callable[[str], None],
) -> ReconciliationReport:
    """Match every submission of a time range with its outcomes. Call `write` with each finding.

    Args:
        settle_s: a submission without an outcome counts as lost if it is older than this, in seconds.

    Raises:
        StreamUnavailable: the stream does not answer.
        SluiceError: the temporary file cannot be written, for example because the disk is full.
    """
    report = ReconciliationReport()
    settled_before_s = datetime.now(UTC).timestamp() - settle_s
    reader = await open_reader(StreamConfig.from_settings(settings))
    try:
        with SpoolDatabase() as spool:
            collector = _StreamCollector(reader, settings, time_range, spool, report, write)
            progress("reading verdicts and dead letters")
            await collector.collect_outcomes(is_first_pass=True)
            progress("reading submissions")
            await collector.collect_submissions()
            progress("reading verdicts and dead letters that arrived meanwhile")
            await collector.collect_outcomes(is_first_pass=False)
            progress("matching")
            for reconciled in match(spool.submissions(), spool.outcomes(), settled_before_s):
                for finding in _add_to_report(reconciled, report, collector.may_be_outside):
                    write(finding)
    except sqlite3.Error as error:
        raise SluiceError(
            f"cannot use the temporary file ({error}); nothing was changed. Free some space, or set TMPDIR to another "
            "folder, and run the command again"
        ) from error
    finally:
        await reader.close()
    return report


def _add_to_report(
    reconciled: ReconciledSubmission, report: ReconciliationReport, may_be_outside: Callable[[SubmissionOutcome], bool]
) -> Iterator[Finding]:
    """Count one submission in the report; yield its findings."""
    if not reconciled.messages:
        for outcome in reconciled.outcomes:
            if may_be_outside(outcome):
                report.outside += 1
            else:
                report.unexplained += 1
                yield Finding(
                    "unexplained",
                    outcome.submission_id,
                    outcome.uri,
                    outcome.source,
                    _format_time(outcome.published_at_s),
                    1,
                    (_name_outcome(outcome),),
                )
        return
    if not reconciled.in_range:
        return
    report.submissions += reconciled.in_range
    for outcome in reconciled.outcomes:
        (report.dead_letters if outcome.is_dead_letter else report.verdicts)[outcome.kind] += 1
    report.lost += len(reconciled.lost)
    report.in_flight += reconciled.in_flight
    report.repeats += reconciled.repeated
    report.conflicting += reconciled.conflicting
    for lost in reconciled.lost:
        yield Finding("lost", lost.submission_id, lost.uri, lost.source, _format_time(lost.published_at_s), 1)
    first = reconciled.messages[0]
    names = tuple(dict.fromkeys(map(_name_outcome, reconciled.outcomes)))[:_MAX_NAMED_OUTCOMES]
    for finding, count in (("repeats", reconciled.repeated), ("conflicting", reconciled.conflicting)):
        if count:
            yield Finding(finding, first.submission_id, first.uri, None, None, count, names)


class _StreamCollector:
    """Reads the streams once and stores their messages in the spool."""

    def __init__(
        self,
        reader: Reader,
        settings: Settings,
        time_range: TimeRange,
        spool: SpoolDatabase,
        report: ReconciliationReport,
        write: Callable[[Finding], None],
    ) -> None:
        self._reader = reader
        self._settings = settings
        self._time_range = time_range
        self._since = time_range.since - _LOOK_BACK if time_range.since else None
        self._spool = spool
        self._report = report
        self._write = write
        self._oldest_submission_at: datetime | None = None
        self._first_submission_offsets: dict[str, tuple[int, ...]] = {}
        """By partition."""
        self._last_outcome_offsets: dict[str, tuple[int, ...]] = {}
        """By partition."""
        self._newest_outcome_at: dict[str, datetime] = {}
        """By stream."""

    async def collect_submissions(self) -> None:
        """Store every entry of every message, parsed as intake parses it."""
        for stream in list_submission_streams(self._settings):
            async for message in self._reader.read(stream, follow=False, since=self._since):
                partition, offset = _parse_position(message.source) or (message.source, ())
                first = self._first_submission_offsets.get(partition, offset)
                self._first_submission_offsets[partition] = min(first, offset)
                in_range = self._time_range.contains(message.timestamp)
                if self._oldest_submission_at is None or message.timestamp < self._oldest_submission_at:
                    self._oldest_submission_at = message.timestamp
                entries = parse(message)
                if in_range and not entries:
                    self._report.ignored += 1
                for entry in entries:
                    self._spool.add_submission(_make_submission_message(entry, message, in_range))

    async def collect_outcomes(self, *, is_first_pass: bool) -> None:
        """Store verdicts and dead letters. A second call stores those that arrived since the first call."""
        for stream, parse_outcomes in (
            (self._settings.verdicts_stream, self._parse_verdict),
            (self._settings.dead_letters_stream, self._parse_dead_letter),
        ):
            async for message in self._read_new(stream):
                for outcome in parse_outcomes(message, is_first_pass):
                    self._spool.add_outcome(outcome)

    async def _read_new(self, stream: str) -> AsyncIterator[Message]:
        read_before = dict(self._last_outcome_offsets)
        newest_at = self._newest_outcome_at.get(stream)
        since = newest_at - _MAX_CLOCK_SKEW if newest_at else self._since
        async for message in self._reader.read(stream, follow=False, since=since):
            partition, offset = _parse_position(message.source) or (message.source, ())
            if offset > read_before.get(partition, ()):
                self._last_outcome_offsets[partition] = max(self._last_outcome_offsets.get(partition, offset), offset)
                self._newest_outcome_at[stream] = max(
                    self._newest_outcome_at.get(stream, message.timestamp), message.timestamp
                )
                yield message

    def _parse_verdict(self, message: Message, is_first_pass: bool) -> Iterator[SubmissionOutcome]:
        try:
            verdict = decode_json(message.value)
        except Malformed:
            verdict = None
        fields = {name: text for name, text in _fields(verdict) if isinstance(text, str)}
        if not fields.keys() >= _VERDICT_FIELDS:
            if is_first_pass and self._time_range.contains(message.timestamp):
                self._report.unexplained += 1
                published_at = _format_time(message.timestamp.timestamp())
                self._write(Finding("unreadable", None, None, message.source, published_at, 1))
            return
        yield SubmissionOutcome(
            key=_submission_key(fields["submission_id"], fields["uri"]),
            identity=fields["verdict_id"],
            kind=fields["outcome"],
            is_dead_letter=False,
            published_at_s=message.timestamp.timestamp(),
            is_first_pass=is_first_pass,
            submission_id=fields["submission_id"],
            uri=fields["uri"],
            source=message.source,
            submitted_at=fields.get("submitted_at"),
        )

    def _parse_dead_letter(self, message: Message, is_first_pass: bool) -> Iterator[SubmissionOutcome]:
        stored = parse_dead_letter(message)
        if stored is None:
            return
        letter = stored.letter
        # A malformed message has no reliable id, so its dead letter is matched by position. So is a dead letter in
        # which no entry can be found.
        for entry in stored.entries if letter.reason != "malformed" and stored.entries else (None,):
            submission = entry.submission if isinstance(entry, ParsedSubmission) else None
            yield SubmissionOutcome(
                key=_submission_key(submission.id, submission.uri) if submission else _position_key(letter.source),
                identity=f"{letter.source} {letter.reason}",
                kind=letter.reason,
                is_dead_letter=True,
                published_at_s=message.timestamp.timestamp(),
                is_first_pass=is_first_pass,
                submission_id=submission.id if submission else stored.submission_id,
                uri=submission.uri if submission else stored.uri,
                source=letter.source,
                submitted_at=None,
            )

    def may_be_outside(self, outcome: SubmissionOutcome) -> bool:
        """Whether the submission of an unmatched outcome may be outside the range that was read."""
        begin = max(filter(None, (self._time_range.since, self._oldest_submission_at)), default=None)
        if begin is None or not outcome.is_first_pass or outcome.published_at_s < begin.timestamp():
            return True
        if self._time_range.until and outcome.published_at_s > self._time_range.until.timestamp():
            return True
        if outcome.is_dead_letter:
            partition, offset = _parse_position(outcome.source) or ("", ())
            first_offset = self._first_submission_offsets.get(partition)
            return bool(partition) and (first_offset is None or offset < first_offset)
        try:
            submitted_at = datetime.fromisoformat(outcome.submitted_at or "")
            return submitted_at.timestamp() < begin.timestamp()
        except (ValueError, OverflowError):
            return False


def _make_submission_message(
    entry: ParsedSubmission | InvalidMessage, message: Message, in_range: bool
) -> SubmissionMessage:
    submission = entry.submission if isinstance(entry, ParsedSubmission) else None
    invalid_id = entry.error.submission_id if isinstance(entry, InvalidMessage) else None
    return SubmissionMessage(
        key=_submission_key(submission.id, submission.uri) if submission else _position_key(message.source),
        published_at_s=message.timestamp.timestamp(),
        in_range=in_range,
        submission_id=submission.id if submission else invalid_id,
        uri=submission.uri if submission else None,
        source=message.source,
    )


def _fields(document: Any) -> Iterable[tuple[str, Any]]:
    return document.items() if isinstance(document, dict) else ()


def _submission_key(submission_id: str, uri: str) -> bytes:
    return _digest(f"id {len(submission_id)} {submission_id}{uri}")


def _position_key(source: str) -> bytes:
    """The key of an entry that is no valid submission: only its position identifies it."""
    return _digest(f"at {source}")


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


def _parse_position(source: str) -> tuple[str, tuple[int, ...]] | None:
    """Partition and offset, or on Redis Streams the stream and the numbers of the entry id. None for other text."""
    partition, _, offset = source.rpartition("/")
    numbers = offset.split("-")
    is_position = partition and all(each.isdecimal() and len(each) <= _MAX_DIGITS for each in numbers)
    return (partition, tuple(map(int, numbers))) if is_position else None


def _name_outcome(outcome: SubmissionOutcome) -> str:
    if outcome.is_dead_letter:
        return f"dead letter {outcome.kind} of {outcome.source}"
    return f"{outcome.kind} {outcome.identity}"


def _format_by_kind(counts: Counter[str]) -> str:
    return escape_control_chars(", ".join(f"{kind} {count:,}" for kind, count in counts.most_common()))


def _format_count(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _format_time(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

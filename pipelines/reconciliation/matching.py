"""Join submissions with their outcomes, to find submissions without exactly one outcome. Pure.

Both sides arrive sorted by key, so only the messages of one key are in memory at a time.
"""

import heapq
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter


@dataclass(frozen=True, slots=True)
class SubmissionMessage:
    """One message of a submission on the stream. A submission may have several messages; each has an outcome."""

    key: bytes
    published_at_s: float
    """Seconds since 1970."""
    in_range: bool
    """Whether it lies in the reconciled range. The others only explain outcomes."""
    submission_id: str | None
    uri: str | None
    source: str


@dataclass(frozen=True, slots=True)
class SubmissionOutcome:
    """A verdict or a dead letter."""

    key: bytes
    """The key of the submission."""
    identity: str
    """Equal for repeats of one outcome: a verdict's id, or a dead letter's reason and position of the submission."""
    kind: str
    """The outcome of a verdict, or the reason of a dead letter."""
    is_dead_letter: bool
    published_at_s: float
    is_first_pass: bool
    """Whether it was read before the submissions. Its submission is then among those that were read."""
    submission_id: str | None
    uri: str | None
    source: str
    """The position of a verdict, or the position of a dead letter's submission."""
    submitted_at: str | None
    """The field of a verdict; None for a dead letter."""


@dataclass(frozen=True, slots=True)
class ReconciledSubmission:
    """All messages of one submission, with all outcomes."""

    messages: tuple[SubmissionMessage, ...]
    outcomes: tuple[SubmissionOutcome, ...]
    """Outcomes read after the submissions are included only where a submission had no outcome yet."""
    lost: tuple[SubmissionMessage, ...]
    """In range, without an outcome, and old enough to have one."""
    in_flight: int
    """In range, without an outcome, but too young to have one."""
    repeated: int
    """Number of surplus outcomes that equal another outcome."""
    conflicting: int
    """Number of surplus outcomes that differ from the others. Repeats of a conflicting outcome count as `repeated`."""

    @property
    def in_range(self) -> int:
        """How many of the messages are in range."""
        return sum(message.in_range for message in self.messages)


def match(
    submissions: Iterable[SubmissionMessage], outcomes: Iterable[SubmissionOutcome], settled_before_s: float
) -> Iterator[ReconciledSubmission]:
    """Yield one result for each key. Both arguments must be sorted by key.

    A verdict does not say which message of a submission it belongs to, so outcomes are given to the oldest messages.
    With n messages and m outcomes, n - m messages have no outcome, or m - n outcomes are surplus. Each message may have
    another outcome, so up to n different outcomes are explained. Further different outcomes are conflicts, and the
    rest of the surplus are repeats.

    Args:
        settled_before_s: seconds since 1970. A later submission need not have an outcome yet.
    """
    both: Iterator[SubmissionMessage | SubmissionOutcome] = heapq.merge(submissions, outcomes, key=attrgetter("key"))
    for _, group in itertools.groupby(both, key=attrgetter("key")):
        yield _match_group(list(group), settled_before_s)


def _match_group(group: list[SubmissionMessage | SubmissionOutcome], settled_before_s: float) -> ReconciledSubmission:
    submissions = sorted(
        (each for each in group if isinstance(each, SubmissionMessage)), key=attrgetter("published_at_s")
    )
    outcomes = [each for each in group if isinstance(each, SubmissionOutcome) and each.is_first_pass]
    read_later = [each for each in group if isinstance(each, SubmissionOutcome) and not each.is_first_pass]
    outcomes += read_later[: max(0, len(submissions) - len(outcomes))]
    open_in_range = [submission for submission in submissions[len(outcomes) :] if submission.in_range]
    lost = tuple(submission for submission in open_in_range if submission.published_at_s < settled_before_s)
    repeated = conflicting = 0
    if any(submission.in_range for submission in submissions):
        different = len({outcome.identity for outcome in outcomes})
        conflicting = max(0, different - len(submissions))
        repeated = max(0, len(outcomes) - len(submissions)) - conflicting
    return ReconciledSubmission(
        tuple(submissions), tuple(outcomes), lost, len(open_in_range) - len(lost), repeated, conflicting
    )

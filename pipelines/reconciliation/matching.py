"""Which submissions have exactly one end: a join of what was submitted with what came of it. Pure.

Both sides come sorted by key, so that nothing but the occurrences of one key has to be in memory at a time.
"""

import heapq
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter


@dataclass(frozen=True, slots=True)
class SeenSubmission:
    """A submission on the stream. The same one may stand there several times, and each of them has an end."""

    key: bytes
    at: float
    """When it was published, in seconds since 1970."""
    counted: bool
    """Whether it lies in the range that is reconciled; others only explain ends."""
    submission_id: str | None
    uri: str | None
    source: str


@dataclass(frozen=True, slots=True)
class SubmissionOutcome:
    """A verdict or a dead letter."""

    key: bytes
    """The submission's."""
    identity: str
    """Equal for repeats of the same end: of a verdict its id, of a dead letter where the submission stood and why."""
    kind: str
    """A verdict's outcome, a dead letter's reason."""
    dead: bool
    at: float
    read_first: bool
    """It was there before the submissions were read, so the submission that it belongs to is among them."""
    submission_id: str | None
    uri: str | None
    source: str
    """Of a dead letter, where the submission stood; of a verdict, where the verdict itself stands."""
    submitted_at: str | None
    """As a verdict has it."""


@dataclass(frozen=True, slots=True)
class ReconciledSubmission:
    """All occurrences of one submission, and all its ends."""

    occurrences: tuple[SeenSubmission, ...]
    ends: tuple[SubmissionOutcome, ...]
    """Those that count: late ones only where an occurrence had none yet."""
    lost: tuple[SeenSubmission, ...]
    """Counted, without an end, and old enough to have one."""
    in_flight: int
    """Counted, without an end, but too young for one."""
    repeats: int
    """Ends too many that are like another one."""
    conflicting: int
    """Different ends too many; what repeats one of them is among the repeats."""

    @property
    def counted(self) -> int:
        return sum(occurrence.counted for occurrence in self.occurrences)


def match(
    occurrences: Iterable[SeenSubmission], ends: Iterable[SubmissionOutcome], settled_before: float
) -> Iterator[ReconciledSubmission]:
    """One case per key; both arguments in the order of their keys.

    Occurrences of one submission cannot be told apart by a verdict, so its ends go to the oldest ones. Of n occurrences
    with m ends, n - m are without one, or m - n are too many. As different occurrences may end differently, up to n
    different ends are explained; what differs beyond that is in conflict, the rest are repeats.

    Args:
        settled_before: seconds since 1970; an occurrence after that need not have an end yet.
    """
    both: Iterator[SeenSubmission | SubmissionOutcome] = heapq.merge(occurrences, ends, key=attrgetter("key"))
    for _, group in itertools.groupby(both, key=attrgetter("key")):
        yield _case(list(group), settled_before)


def _case(group: list[SeenSubmission | SubmissionOutcome], settled_before: float) -> ReconciledSubmission:
    occurrences = sorted((each for each in group if isinstance(each, SeenSubmission)), key=attrgetter("at"))
    ends = [each for each in group if isinstance(each, SubmissionOutcome) and each.read_first]
    late = [each for each in group if isinstance(each, SubmissionOutcome) and not each.read_first]
    ends += late[: max(0, len(occurrences) - len(ends))]
    without = [occurrence for occurrence in occurrences[len(ends) :] if occurrence.counted]
    lost = tuple(occurrence for occurrence in without if occurrence.at < settled_before)
    repeats = conflicting = 0
    if any(occurrence.counted for occurrence in occurrences):
        different = len({end.identity for end in ends})
        conflicting = max(0, different - len(occurrences))
        repeats = max(0, len(ends) - len(occurrences)) - conflicting
    return ReconciledSubmission(tuple(occurrences), tuple(ends), lost, len(without) - len(lost), repeats, conflicting)

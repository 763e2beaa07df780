"""Compares the outcomes of a run with those that its submissions should have. Pure.

- Every submission has an outcome, and every outcome belongs to a submission.
- Exactly once: each submission has one outcome. At least once: further outcomes of a submission equal the first one
  (the verdict's `verdict_id`; the dead letter's reason).
- Dead letters are exactly the expected ones, with the original bytes, key and id. Verdicts have the rating that the
  guard gives to the image.
- Of the S3 events about one object, all but the newest may be superseded. It depends on the members that receive them
  which ones are. At least once, a repeated outcome may therefore be `superseded` or not; repeats of one kind are equal.
- Outcomes of one key come in the order of its submissions. Exactly once, this is the order on each output stream. At
  least once, it is the order of the first outcomes, because a redelivered message goes through the same order again.
  A message that is no submission waits for no other message, whatever its key. Verdicts and dead letters are on
  different streams, so the order between the two is not checked.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, get_args

from services.core.errors import DeadLetterReason
from services.core.messages import DeadLetter, Verdict
from services.streams.base import Message
from services.streams.parsing import ParsedSubmission, parse
from tests.faults.submissions import ExpectedOutcome, Submitted

_SHOWN: Final = 10
_REASONS: Final = frozenset(get_args(DeadLetterReason))


@dataclass(frozen=True, slots=True)
class Outcome:
    """A verdict or a dead letter."""

    of: Hashable
    """The submission: its id, or the bytes of a message without an id."""
    identity: str
    """Equal for repeats of the same outcome."""
    kind: str
    """A verdict's outcome, a dead letter's reason."""
    message: Message

    @property
    def is_dead_letter(self) -> bool:
        return self.kind in _REASONS


@dataclass(slots=True)
class Findings:
    """Counts, and sentences about each problem."""

    submissions: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    """By outcome; repeats count."""
    dead_letters: Counter[str] = field(default_factory=Counter)
    """By reason; repeats count."""
    lost: int = 0
    duplicates: int = 0
    """Surplus outcomes, allowed or not."""
    unequal: int = 0
    """Submissions with different outcomes."""
    wrong_dead_letters: int = 0
    """Unexpected dead letters, and those with another reason than expected."""
    problems: list[str] = field(default_factory=list)

    def sentences(self) -> list[str]:
        """The first problems, and the number of further ones."""
        more = len(self.problems) - _SHOWN
        return self.problems[:_SHOWN] + ([f"... and {more} more"] if more > 0 else [])


def check(
    submitted: Sequence[Submitted],
    on_stream: Sequence[Message],
    verdicts: Sequence[Message],
    letters: Sequence[Message],
    *,
    exactly_once: bool,
) -> Findings:
    """Compare the submissions with the messages on the three streams. Each partition is in its order."""
    found = Findings()
    expected = {_name(outcome, each.value): (outcome, each) for each in submitted for outcome in each.expected}
    found.submissions = len(expected)
    if Counter(message.value for message in on_stream) != Counter(each.value for each in submitted):
        found.problems.append(
            "the stream of submissions does not hold each message once; the harness published wrongly"
        )
    places = _places(submitted, on_stream)
    outcomes: defaultdict[Hashable, list[Outcome]] = defaultdict(list)
    for stream, read, counted in ((verdicts, _verdict, found.verdicts), (letters, _letter, found.dead_letters)):
        in_order = [read(message) for message in stream]
        for outcome in in_order:
            counted[outcome.kind] += 1
            outcomes[outcome.of].append(outcome)
        found.problems += _out_of_order(in_order, places, exactly_once=exactly_once)
    found.problems += [f"{name} was never submitted" for name in outcomes.keys() - expected.keys()]
    for name, (expectation, sent) in expected.items():
        if name not in outcomes:
            found.lost += 1
            found.problems.append(f"{name} is lost")
            continue
        found.duplicates += len(outcomes[name]) - 1
        found.unequal += _differ(expectation, outcomes[name])
        found.wrong_dead_letters += sum(
            outcome.is_dead_letter and outcome.kind != expectation.reason for outcome in outcomes[name]
        )
        found.problems += _wrong(name, expectation, sent, outcomes[name], exactly_once=exactly_once)
    return found


def _name(outcome: ExpectedOutcome, value: bytes) -> Hashable:
    return outcome.submission_id or value


def _verdict(message: Message) -> Outcome:
    verdict = Verdict.model_validate_json(message.value)
    return Outcome(verdict.submission_id, f"{verdict.outcome} {verdict.verdict_id}", verdict.outcome, message)


def _letter(message: Message) -> Outcome:
    letter = DeadLetter.from_headers(message.headers)
    return Outcome(letter.submission_id or message.value, f"dead letter {letter.reason}", letter.reason, message)


def _wrong(
    name: Hashable, expected: ExpectedOutcome, sent: Submitted, outcomes: Sequence[Outcome], *, exactly_once: bool
) -> Iterable[str]:
    if exactly_once and len(outcomes) > 1:
        yield f"{name} has {len(outcomes)} outcomes"
    if _differ(expected, outcomes):
        yield f"{name} has different outcomes: {', '.join(sorted({outcome.identity for outcome in outcomes}))}"
    for outcome in outcomes:
        if expected.reason is None:
            yield from _wrong_verdict(name, expected, outcome)
        elif outcome.kind != expected.reason:
            yield f"{name} should have the dead letter {expected.reason}, and has {outcome.kind}"
        elif (outcome.message.value, outcome.message.key) != (sent.value, sent.key):
            yield f"the dead letter of {name} does not have the original bytes and key"


def _differ(expected: ExpectedOutcome, outcomes: Sequence[Outcome]) -> bool:
    # An event that may be superseded may have one outcome of each kind. Repeats of one kind are equal.
    return len({outcome.identity for outcome in outcomes}) > (
        len({outcome.kind for outcome in outcomes}) if expected.may_be_superseded else 1
    )


def _wrong_verdict(name: Hashable, expected: ExpectedOutcome, outcome: Outcome) -> Iterable[str]:
    if outcome.kind == "superseded" and expected.may_be_superseded:
        return
    if outcome.kind != "verdict":
        yield f"{name} should have a verdict, and has {outcome.kind}"
        return
    verdict = Verdict.model_validate_json(outcome.message.value)
    if (verdict.sha256, verdict.rating) != (expected.sha256, expected.rating):
        yield f"{name} has the verdict of another image: {verdict.rating}, {verdict.sha256}"


def _places(submitted: Sequence[Submitted], on_stream: Sequence[Message]) -> Mapping[Hashable, tuple[bytes, int]]:
    """By submission: the key of its outcome, and its number on the stream. Submissions with one key are in order."""
    sent_by_value = {each.value: each for each in submitted}
    places: dict[Hashable, tuple[bytes, int]] = {}
    for message in on_stream:
        if (sent := sent_by_value.get(message.value)) is None:
            continue
        keys = [entry.key for entry in parse(message) if isinstance(entry, ParsedSubmission)]
        for outcome, key in zip(sent.expected, keys or [message.key or b""], strict=True):
            places[_name(outcome, sent.value)] = (key, len(places))
    return places


def _out_of_order(
    outcomes: Sequence[Outcome], places: Mapping[Hashable, tuple[bytes, int]], *, exactly_once: bool
) -> Iterable[str]:
    latest: dict[bytes, int] = {}
    seen: set[Hashable] = set()
    for outcome in outcomes:
        if outcome.of not in places or (not exactly_once and (outcome.of in seen or outcome.kind == "malformed")):
            continue
        seen.add(outcome.of)
        key, place = places[outcome.of]
        if key and place < latest.get(key, -1):
            yield f"{outcome.of} has its outcome after that of a later submission with its key {key.decode()}"
        latest[key] = max(place, latest.get(key, -1))

"""Whether every submission ended as it deserved: what went in against what came out. Pure.

- Every submission has an end, and no end belongs to nothing.
- Exactly once: one end each. At least once: further ends of a submission are equal to its first one (the verdict's
  `verdict_id`; the dead letter's reason).
- Dead letters are exactly those that were deserved, with the original bytes, key and id. Verdicts say what the guard
  says about that image.
- Of S3 events about one object, all but the newest may be superseded. Which of them are depends on who received them
  when, so under at least once a repeated end may differ in that; those with the same outcome are still equal.
- Ends of one key come in the order of its submissions. Exactly once: that is the order on each output stream. At least
  once: it is the order of the first ends, since whoever publishes an end has published those before it, or has begun
  behind them because they were committed; what is redelivered then goes through the same order again. A message that
  is no submission waits for nobody there, whatever its key. Dead letters and verdicts are on different streams, so
  nothing is said about the order between the two.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, get_args

from services.core.errors import DeadLetterReason
from services.core.messages import DeadLetter, Verdict
from services.streams.base import Message
from services.streams.parsing import ParsedSubmission, parse
from tests.faults.submissions import Deserved, Submitted

_SHOWN: Final = 10
_REASONS: Final = frozenset(get_args(DeadLetterReason))


@dataclass(frozen=True, slots=True)
class End:
    """A verdict or a dead letter."""

    of: Hashable
    """Which submission: its id, or the bytes of a message without one."""
    identity: str
    """Equal for repeats of the same end."""
    kind: str
    """A verdict's outcome, a dead letter's reason."""
    message: Message

    @property
    def is_dead_letter(self) -> bool:
        return self.kind in _REASONS


@dataclass(slots=True)
class Findings:
    """What was counted, and what is wrong."""

    submissions: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    """By outcome; repeats count."""
    dead_letters: Counter[str] = field(default_factory=Counter)
    """By reason; repeats count."""
    lost: int = 0
    duplicates: int = 0
    """Ends too many, whether allowed or not."""
    unequal: int = 0
    """Submissions whose ends differ where they must not."""
    wrong_dead_letters: int = 0
    """Dead letters that were not deserved, or not for that reason."""
    problems: list[str] = field(default_factory=list)

    def sentences(self) -> list[str]:
        """The first problems, and how many there are besides."""
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
    """Judge a run by what was to be submitted and what is on the three streams, each partition in its order."""
    found = Findings()
    deserved = {_name(end, each.value): (end, each) for each in submitted for end in each.ends}
    found.submissions = len(deserved)
    if Counter(message.value for message in on_stream) != Counter(each.value for each in submitted):
        found.problems.append("the stream of submissions does not hold each message once: the publisher's fault")
    places = _places(submitted, on_stream)
    ends: defaultdict[Hashable, list[End]] = defaultdict(list)
    for stream, read, counted in ((verdicts, _verdict, found.verdicts), (letters, _letter, found.dead_letters)):
        in_order = [read(message) for message in stream]
        for end in in_order:
            counted[end.kind] += 1
            ends[end.of].append(end)
        found.problems += _out_of_order(in_order, places, exactly_once=exactly_once)
    found.problems += [f"{name} was never submitted" for name in ends.keys() - deserved.keys()]
    for name, (deserves, sent) in deserved.items():
        if name not in ends:
            found.lost += 1
            found.problems.append(f"{name} is lost")
            continue
        found.duplicates += len(ends[name]) - 1
        found.unequal += _differ(deserves, ends[name])
        found.wrong_dead_letters += sum(end.is_dead_letter and end.kind != deserves.reason for end in ends[name])
        found.problems += _wrong(name, deserves, sent, ends[name], exactly_once=exactly_once)
    return found


def _name(end: Deserved, value: bytes) -> Hashable:
    return end.submission_id or value


def _verdict(message: Message) -> End:
    verdict = Verdict.model_validate_json(message.value)
    return End(verdict.submission_id, f"{verdict.outcome} {verdict.verdict_id}", verdict.outcome, message)


def _letter(message: Message) -> End:
    letter = DeadLetter.from_headers(message.headers)
    return End(letter.submission_id or message.value, f"dead letter {letter.reason}", letter.reason, message)


def _wrong(
    name: Hashable, deserved: Deserved, sent: Submitted, ends: Sequence[End], *, exactly_once: bool
) -> Iterable[str]:
    if exactly_once and len(ends) > 1:
        yield f"{name} has {len(ends)} ends"
    if _differ(deserved, ends):
        yield f"{name} has ends that differ: {', '.join(sorted({end.identity for end in ends}))}"
    for end in ends:
        if deserved.reason is None:
            yield from _wrong_verdict(name, deserved, end)
        elif end.kind != deserved.reason:
            yield f"{name} deserves the dead letter {deserved.reason}, and has {end.kind}"
        elif (end.message.value, end.message.key) != (sent.value, sent.key):
            yield f"the dead letter of {name} does not have the original bytes and key"


def _differ(deserved: Deserved, ends: Sequence[End]) -> bool:
    # One for each outcome at most: repeats of the same outcome are equal also where an event may be superseded.
    return len({end.identity for end in ends}) > (len({end.kind for end in ends}) if deserved.may_be_superseded else 1)


def _wrong_verdict(name: Hashable, deserved: Deserved, end: End) -> Iterable[str]:
    if end.kind == "superseded" and deserved.may_be_superseded:
        return
    if end.kind != "verdict":
        yield f"{name} deserves a verdict, and has {end.kind}"
        return
    verdict = Verdict.model_validate_json(end.message.value)
    if (verdict.sha256, verdict.rating) != (deserved.sha256, deserved.rating):
        yield f"{name} has the verdict of another image: {verdict.rating}, {verdict.sha256}"


def _places(submitted: Sequence[Submitted], on_stream: Sequence[Message]) -> Mapping[Hashable, tuple[bytes, int]]:
    """Of each submission the key of its end, and its place among all submissions, in which every key is in order."""
    ends = {each.value: each for each in submitted}
    places: dict[Hashable, tuple[bytes, int]] = {}
    for message in on_stream:
        if (sent := ends.get(message.value)) is None:
            continue
        keys = [entry.key for entry in parse(message) if isinstance(entry, ParsedSubmission)]
        for end, key in zip(sent.ends, keys or [message.key or b""], strict=True):
            places[_name(end, sent.value)] = (key, len(places))
    return places


def _out_of_order(
    ends: Sequence[End], places: Mapping[Hashable, tuple[bytes, int]], *, exactly_once: bool
) -> Iterable[str]:
    latest: dict[bytes, int] = {}
    seen: set[Hashable] = set()
    for end in ends:
        if end.of not in places or (not exactly_once and (end.of in seen or end.kind == "malformed")):
            continue
        seen.add(end.of)
        key, place = places[end.of]
        if key and place < latest.get(key, -1):
            yield f"{end.of} ends after a later submission with its key {key.decode()}"
        latest[key] = max(place, latest.get(key, -1))

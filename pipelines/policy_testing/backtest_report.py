"""What would change if another version of a policy judged: the figures of a backtest.

A sample of recent submissions is judged under two policy versions, `before` and `after`. Here the pairs of verdicts
become a report; whoever gets the verdicts, and the page that shows the report, are elsewhere.

Every interval is a 95 % confidence interval and takes the sample for a random one of the submissions to come.
Rates are over the pairs that were judged under both versions, so that both sides are about the same images.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

from pipelines.reporting.statistics import Interval, Share, ShareDifference, paired_difference, share
from pipelines.reporting.text import escape_control_chars
from services.core.messages import Verdict
from services.core.values import Action, Rating, ReviewReason

UNREADABLE: Final = "unreadable answer"
"""Stands for the category where the guard's answer could not be read."""

_SEVERITY: Final[dict[Action, int]] = {"allow": 0, "review": 1, "block": 2}


@dataclass(frozen=True, slots=True)
class Side:
    """How one submission ended under one policy version: judged, or why it could not be. Exactly one is given.

    Raises:
        ValueError: both or neither are given.
    """

    verdict: Verdict | None
    error: str | None
    """`reason: sentence`, where the reason is a dead letter's."""

    def __post_init__(self) -> None:
        if (self.verdict is None) == (self.error is None):
            raise ValueError("a side has either a verdict or an error")


@dataclass(frozen=True, slots=True)
class VerdictPair:
    """One submission of the sample, under both policy versions."""

    submission_id: str
    uri: str
    before: Side
    after: Side
    picture: bytes | None
    """A JPEG for the page, its longer edge at most 320 px."""


class _Figures(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Estimate(_Figures):
    """An expected number."""

    value: float
    interval: Interval

    def __str__(self) -> str:
        return f"{_number(self.value)} ({_number(self.interval.low)} to {_number(self.interval.high)})"


class ReviewLoad(_Figures):
    """Reviews to expect, before and after, and after minus before."""

    before: Estimate
    after: Estimate
    change: Estimate


class ActionRates(_Figures):
    """What one policy version makes of the submissions that were judged under both."""

    policy: str
    """Such as `default@3`."""
    allow: Share
    review: Share
    """Includes every verdict whose outcome is `needs_review`."""
    block: Share
    unreadable: Share
    """Reviews because the guard's answer could not be read."""


class Failures(_Figures):
    """Submissions of the whole sample that could not be judged under one policy version."""

    all: Share
    by_reason: dict[str, int]
    """By the dead letter's reason, most frequent first."""


class VerdictSummary(_Figures):
    """What a verdict says."""

    action: Action
    rating: Rating | None
    category: str | None
    score: float | None
    """P(Unsafe) in [0, 1]."""
    rationale: str | None
    reason: ReviewReason | None
    """Why a person has to look, where the guard did not settle it."""


class Flip(_Figures):
    """A submission whose action, rating or category differs."""

    submission_id: str
    uri: str
    before: VerdictSummary
    after: VerdictSummary


class FlipGroup(_Figures):
    """Flips with the same actions before and after, and the same category on the more severe side.

    The more severe side is the one with the severer action, else with the higher score, else `after`.
    """

    before: Action
    after: Action
    category: str
    """`UNREADABLE` where the more severe side has none."""
    flips: tuple[Flip, ...]
    """Largest change of the score first."""

    @property
    def direction(self) -> str:
        """Such as `allow → block`."""
        return f"{self.before} → {self.after}"

    @property
    def changes_action(self) -> bool:
        """Whether more than the rating or the category differs."""
        return self.before != self.after


ShareThreshold = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
"""A share in [0, 1]."""


class ActionThresholds(_Figures):
    """What a new policy version may change at most. Shares in [0, 1]; what is not given is not checked."""

    max_block_rate: ShareThreshold | None = None
    """Of `after`."""
    max_review_rate: ShareThreshold | None = None
    """Of `after`."""
    max_block_increase: ShareThreshold | None = None
    """After minus before: 0.01 is one percentage point."""
    max_review_increase: ShareThreshold | None = None
    """After minus before: 0.01 is one percentage point."""
    max_flips: ShareThreshold | None = None
    """Share whose action flips, of those judged under both."""
    max_errors: ShareThreshold | None = None
    """Share that could not be judged under `after`, of the whole sample."""


class BacktestReport(_Figures):
    """The outcome of a backtest."""

    pairs: int
    judged_both: int
    judged_before_only: int
    judged_after_only: int
    judged_neither: int
    failures_before: Failures
    failures_after: Failures
    before: ActionRates
    after: ActionRates
    block_difference: ShareDifference
    review_difference: ShareDifference
    action_flips: Share
    """Of those judged under both."""
    flip_groups: tuple[FlipGroup, ...]
    """Changes of the action first, the largest and most frequent of them first."""
    reviews_per_thousand: ReviewLoad | None
    """Per 1,000 submissions that can be judged; unknown where nothing was judged under both."""
    reviews_per_day: ReviewLoad | None
    """The same for the submissions of a day; unknown also where their number is."""

    @property
    def flips(self) -> int:
        """Submissions whose action, rating or category differs."""
        return sum(len(group.flips) for group in self.flip_groups)

    def exceeded(self, thresholds: ActionThresholds) -> list[str]:
        """One sentence for each bound that is exceeded, with the figure and the bound.

        What is compared is the point estimate, not the end of its interval: a small sample can exceed a bound, or
        keep it, by chance. A figure that is exactly on its bound keeps it. A bound whose figure is unknown, because
        nothing was judged, counts as exceeded: no evidence is no reason to go ahead.
        """
        checks: tuple[tuple[str, Share | ShareDifference, float | None], ...] = (
            (f"The block rate under {self.after.policy}", self.after.block, thresholds.max_block_rate),
            (f"The review rate under {self.after.policy}", self.after.review, thresholds.max_review_rate),
            ("The increase of the block rate", self.block_difference, thresholds.max_block_increase),
            ("The increase of the review rate", self.review_difference, thresholds.max_review_increase),
            ("The share of submissions whose action flips", self.action_flips, thresholds.max_flips),
            (f"The share not judged under {self.after.policy}", self.failures_after.all, thresholds.max_errors),
        )
        found = (_exceeded(what, figure, bound) for what, figure, bound in checks if bound is not None)
        return [sentence for sentence in found if sentence]

    def lines(self) -> list[str]:
        """A summary for a terminal, one line each, without ids, addresses and rationales."""
        return [escape_control_chars(line) for line in _summary(self)]


def summarize(pairs: Sequence[VerdictPair], *, before: str, after: str, per_day: float | None) -> BacktestReport:
    """The report on a sample.

    Args:
        pairs: the sample; it may be empty.
        before: the policy version that judges today, such as `default@3`.
        after: the policy version that would judge instead.
        per_day: submissions per day, taken as exact; None where unknown.

    Raises:
        ValueError: `per_day` is negative or not finite.
    """
    if per_day is not None and not (math.isfinite(per_day) and per_day >= 0):
        raise ValueError("per_day must be a number of submissions")
    sides = [(pair, _judged(pair.before), _judged(pair.after)) for pair in pairs]
    both = [(pair, earlier, later) for pair, earlier, later in sides if earlier and later]
    neither = sum(not earlier and not later for _, earlier, later in sides)
    failures_before = _failures(len(pairs), (pair.before for pair, earlier, _ in sides if not earlier))
    failures_after = _failures(len(pairs), (pair.after for pair, _, later in sides if not later))
    rates_before = _rates(before, [earlier for _, earlier, _ in both])
    rates_after = _rates(after, [later for _, _, later in both])
    actions = Counter((earlier.action, later.action) for _, earlier, later in both)
    review_difference = _difference_of("review", actions)
    thousand = _load(rates_before.review, rates_after.review, review_difference, 1000)
    return BacktestReport(
        pairs=len(pairs),
        judged_both=len(both),
        judged_before_only=failures_after.all.count - neither,
        judged_after_only=failures_before.all.count - neither,
        judged_neither=neither,
        failures_before=failures_before,
        failures_after=failures_after,
        before=rates_before,
        after=rates_after,
        block_difference=_difference_of("block", actions),
        review_difference=review_difference,
        action_flips=share(sum(actions[kinds] for kinds in actions if kinds[0] != kinds[1]), len(both)),
        flip_groups=_groups(
            Flip(submission_id=pair.submission_id, uri=pair.uri, before=earlier, after=later)
            for pair, earlier, later in both
            if (earlier.action, earlier.rating, earlier.category) != (later.action, later.rating, later.category)
        ),
        reviews_per_thousand=thousand,
        reviews_per_day=None
        if per_day is None
        else _load(rates_before.review, rates_after.review, review_difference, per_day),
    )


def _judged(side: Side) -> VerdictSummary | None:
    verdict = side.verdict
    if verdict is None:
        return None
    action = "review" if verdict.outcome == "needs_review" else verdict.action
    if action is None:  # superseded: it says nothing about the image
        return None
    return VerdictSummary(
        action=action,
        rating=verdict.rating,
        category=verdict.category,
        score=verdict.score,
        rationale=verdict.rationale,
        reason=verdict.reason,
    )


def _failures(of: int, sides: Iterable[Side]) -> Failures:
    reasons = Counter(map(_reason, sides))
    return Failures(all=share(reasons.total(), of), by_reason=dict(reasons.most_common()))


def _reason(side: Side) -> str:
    if side.verdict:
        return side.verdict.outcome
    # Sentences name objects and sizes: counted whole, each would be a reason of its own.
    named = re.match(r"([a-z_]+)(?::|$)", side.error or "")
    return named[1] if named else "other"


def _rates(policy: str, judged: Sequence[VerdictSummary]) -> ActionRates:
    actions = Counter(judgement.action for judgement in judged)
    return ActionRates(
        policy=policy,
        allow=share(actions["allow"], len(judged)),
        review=share(actions["review"], len(judged)),
        block=share(actions["block"], len(judged)),
        unreadable=share(sum(judgement.reason == "unreadable_answer" for judgement in judged), len(judged)),
    )


def _difference_of(action: Action, pairs: Counter[tuple[Action, Action]]) -> ShareDifference:
    counts: Counter[tuple[bool, bool]] = Counter()
    for (before, after), count in pairs.items():
        counts[before == action, after == action] += count
    return paired_difference(
        both=counts[True, True],
        before_only=counts[True, False],
        after_only=counts[False, True],
        neither=counts[False, False],
    )


def _load(before: Share, after: Share, difference: ShareDifference, submissions: float) -> ReviewLoad | None:
    def estimate(value: float | None, interval: Interval | None) -> Estimate | None:
        if value is None or interval is None:
            return None
        return Estimate(value=value * submissions, interval=interval.times(submissions))

    earlier, later = estimate(before.share, before.interval), estimate(after.share, after.interval)
    change = estimate(difference.difference, difference.interval)
    return ReviewLoad(before=earlier, after=later, change=change) if earlier and later and change else None


def _groups(flips: Iterable[Flip]) -> tuple[FlipGroup, ...]:
    found: defaultdict[tuple[Action, Action, str], list[Flip]] = defaultdict(list)
    for flip in flips:
        severe = max(flip.after, flip.before, key=_severity)  # of equals, max takes the first
        found[flip.before.action, flip.after.action, severe.category or UNREADABLE].append(flip)
    groups = [
        FlipGroup(before=before, after=after, category=category, flips=tuple(sorted(members, key=_by_change)))
        for (before, after, category), members in found.items()
    ]
    return tuple(sorted(groups, key=_by_weight))


def _severity(judgement: VerdictSummary) -> tuple[int, float]:
    return _SEVERITY[judgement.action], -1.0 if judgement.score is None else judgement.score


def _by_change(flip: Flip) -> tuple[float, str, str]:
    before, after = flip.before.score, flip.after.score
    # An answer that cannot be read is the largest change there is.
    change = 1.0 if before is None or after is None else abs(after - before)
    return -change, flip.submission_id, flip.uri


def _by_weight(group: FlipGroup) -> tuple[int, int, str, str]:
    steps = abs(_SEVERITY[group.after] - _SEVERITY[group.before])
    return -steps, -len(group.flips), group.direction, group.category


def _exceeded(what: str, figure: Share | ShareDifference, bound: float) -> str | None:
    value, unit = (figure.share, "%") if isinstance(figure, Share) else (figure.difference, " percentage points")
    limit = f"its bound is {100 * bound:.4g}{unit}"
    if value is None:
        return f"{what} is unknown, for no submission was judged; {limit}."
    if value <= bound:
        return None
    count = figure.count if isinstance(figure, Share) else figure.after_only - figure.before_only
    return f"{what} is {100 * value:.4g}{unit} ({count:,} of {figure.of:,} submissions); {limit}."


def _summary(report: BacktestReport) -> Iterator[str]:
    before, after = report.before, report.after
    yield f"{before.policy} → {after.policy}: {report.pairs:,} submissions, {report.judged_both:,} judged under both"
    for rates, failures in ((before, report.failures_before), (after, report.failures_after)):
        if failures.all.count:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in failures.by_reason.items())
            yield f"not judged under {rates.policy}: {failures.all.count:,} ({reasons})"
    if not report.judged_both:
        yield "No submission was judged under both, so nothing is known about what would change."
        return
    width = max(25, len(before.policy) + 2, len(after.policy) + 2)
    yield f"{'':12}{before.policy:{width}}{after.policy:{width}}change"
    yield f"{'allow':12}{before.allow!s:{width}}{after.allow!s}"
    yield f"{'review':12}{before.review!s:{width}}{after.review!s:{width}}{report.review_difference}"
    yield f"{'block':12}{before.block!s:{width}}{after.block!s:{width}}{report.block_difference}"
    yield f"{'unreadable':12}{before.unreadable!s:{width}}{after.unreadable!s}"
    for unit, load in (("1,000 submissions", report.reviews_per_thousand), ("day", report.reviews_per_day)):
        if load:
            yield f"reviews per {unit}: {load.before} → {load.after}, change {load.change}"
    rest = report.flips - report.action_flips.count
    yield f"flips: {report.action_flips.count:,} of the action, {rest:,} of only the rating or the category"
    for group in report.flip_groups:
        yield f"  {len(group.flips):>6,}  {group.direction:16}  {group.category}"


def _number(value: float) -> str:
    return f"{value:,.1f}" if abs(value) < 100 else f"{value:,.0f}"

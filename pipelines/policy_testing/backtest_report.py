"""Builds the report of a backtest from pairs of verdicts: a sample of submissions, judged under two policy versions.

Every interval is a 95 % confidence interval. It treats the sample as a random sample of future submissions. Rates are
over the pairs that were judged under both versions, so both sides are about the same images.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Final

from pydantic import Field

from pipelines.reporting.frozen_model import FrozenModel
from pipelines.reporting.statistics import Interval, Share, ShareDifference, compute_paired_difference, compute_share
from services.core.messages import Verdict
from services.core.text import escape_control_chars
from services.core.values import Action, Rating, ReviewReason

UNREADABLE: Final = "unreadable answer"
"""Replaces the category if the guard's answer is unreadable."""

_SEVERITY: Final[dict[Action, int]] = {"allow": 0, "review": 1, "block": 2}


@dataclass(frozen=True, slots=True)
class Side:
    """The result of one submission under one policy version: a verdict, or an error. Exactly one is given.

    Raises:
        ValueError: both or neither are given.
    """

    verdict: Verdict | None
    error: str | None
    """`reason: sentence`, with the reason of a dead letter."""

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


class Estimate(FrozenModel):
    """An expected number."""

    value: float
    interval: Interval

    def __str__(self) -> str:
        low, high = map(_format_number, (self.interval.low, self.interval.high))
        return f"{_format_number(self.value)} ({low} to {high})"


class ReviewLoad(FrozenModel):
    """Expected reviews before and after, and their difference, after minus before."""

    before: Estimate
    after: Estimate
    change: Estimate


class ActionRates(FrozenModel):
    """The actions of one policy version on the submissions that were judged under both."""

    policy: str
    """The policy version, such as `default@3`."""
    allow: Share
    review: Share
    """Includes every verdict with the outcome `needs_review`."""
    block: Share
    unreadable: Share
    """Reviews because the guard's answer is unreadable."""


class Failures(FrozenModel):
    """Submissions of the whole sample that could not be judged under one policy version."""

    all: Share
    by_reason: dict[str, int]
    """Counts by the reason of a dead letter, most frequent first."""


class VerdictSummary(FrozenModel):
    """The fields of a verdict that are compared or shown."""

    action: Action
    rating: Rating | None
    category: str | None
    score: float | None
    """P(Unsafe) in [0, 1]."""
    rationale: str | None
    reason: ReviewReason | None
    """Why a person has to decide, if the guard did not."""


class Flip(FrozenModel):
    """A submission whose action, rating or category differs between the versions."""

    submission_id: str
    uri: str
    before: VerdictSummary
    after: VerdictSummary


class FlipGroup(FrozenModel):
    """Flips with the same actions before and after, and the same category on the more severe side.

    The more severe side has the more severe action, else the higher score; otherwise it is `after`.
    """

    before: Action
    after: Action
    category: str
    """`UNREADABLE` if the more severe side has none."""
    flips: tuple[Flip, ...]
    """Largest change of the score first."""

    @property
    def direction(self) -> str:
        """The change of the action, such as `allow → block`."""
        return f"{self.before} → {self.after}"


ShareLimit = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
"""A share in [0, 1]."""


class BacktestLimits(FrozenModel):
    """Limits of a backtest for the new policy version, as shares in [0, 1]. A limit that is None is not checked."""

    max_block_rate: ShareLimit | None = None
    """The limit for the rate under `after`."""
    max_review_rate: ShareLimit | None = None
    """The limit for the rate under `after`."""
    max_block_increase: ShareLimit | None = None
    """After minus before: 0.01 is one percentage point."""
    max_review_increase: ShareLimit | None = None
    """After minus before: 0.01 is one percentage point."""
    max_flips: ShareLimit | None = None
    """The share of the submissions judged under both whose action differs."""
    max_errors: ShareLimit | None = None
    """The share of the whole sample that could not be judged under `after`."""


class BacktestReport(FrozenModel):
    """The figures of a backtest. The fields that no code reads are for the JSON."""

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
    """The share of the submissions judged under both whose action differs."""
    flip_groups: tuple[FlipGroup, ...]
    """Groups with a change of the action first, the largest change and the most frequent first."""
    reviews_per_thousand: ReviewLoad | None
    """Per 1,000 submissions that can be judged; None if no submission was judged under both."""
    reviews_per_day: ReviewLoad | None
    """Per day; None also if the number of submissions per day is unknown."""

    @property
    def flips(self) -> int:
        """The number of submissions whose action, rating or category differs."""
        return sum(len(group.flips) for group in self.flip_groups)

    def exceeded(self, limits: BacktestLimits) -> list[str]:
        """One sentence for each limit that is exceeded, with the figure and the limit.

        Point estimates are compared, not the ends of intervals, so a small sample can exceed or meet a limit by chance.
        A figure equal to its limit does not exceed it. If nothing was judged, the figure is unknown and counts as
        exceeded, because there is no evidence for the new version.
        """
        checks: tuple[tuple[str, Share | ShareDifference, float | None], ...] = (
            (f"The block rate under {self.after.policy}", self.after.block, limits.max_block_rate),
            (f"The review rate under {self.after.policy}", self.after.review, limits.max_review_rate),
            ("The increase of the block rate", self.block_difference, limits.max_block_increase),
            ("The increase of the review rate", self.review_difference, limits.max_review_increase),
            ("The share of submissions whose action flips", self.action_flips, limits.max_flips),
            (f"The share not judged under {self.after.policy}", self.failures_after.all, limits.max_errors),
        )
        found = (_compare(subject, figure, limit) for subject, figure, limit in checks if limit is not None)
        return [sentence for sentence in found if sentence]

    def lines(self) -> list[str]:
        """A summary for a terminal, without ids, addresses and rationales."""
        return [escape_control_chars(line) for line in _write_summary(self)]


def build_report(pairs: Sequence[VerdictPair], *, before: str, after: str, per_day: float | None) -> BacktestReport:
    """The report on a sample.

    Args:
        pairs: the sample; it may be empty.
        before: the policy version to compare with, such as `default@3`.
        after: the new policy version.
        per_day: submissions per day, treated as exact; None if unknown.

    Raises:
        ValueError: `per_day` is negative or not finite.
    """
    if per_day is not None and not (math.isfinite(per_day) and per_day >= 0):
        raise ValueError("per_day must be a number of submissions")
    sides = [(pair, _summarize(pair.before), _summarize(pair.after)) for pair in pairs]
    both = [(pair, earlier, later) for pair, earlier, later in sides if earlier and later]
    neither = sum(not earlier and not later for _, earlier, later in sides)
    failures_before = _count_failures(len(pairs), (pair.before for pair, earlier, _ in sides if not earlier))
    failures_after = _count_failures(len(pairs), (pair.after for pair, _, later in sides if not later))
    rates_before = _compute_rates(before, [earlier for _, earlier, _ in both])
    rates_after = _compute_rates(after, [later for _, _, later in both])
    actions = Counter((earlier.action, later.action) for _, earlier, later in both)
    review_difference = _compute_difference("review", actions)
    thousand = _estimate_review_load(rates_before.review, rates_after.review, review_difference, 1000)
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
        block_difference=_compute_difference("block", actions),
        review_difference=review_difference,
        action_flips=compute_share(sum(actions[kinds] for kinds in actions if kinds[0] != kinds[1]), len(both)),
        flip_groups=_group_flips(
            Flip(submission_id=pair.submission_id, uri=pair.uri, before=earlier, after=later)
            for pair, earlier, later in both
            if (earlier.action, earlier.rating, earlier.category) != (later.action, later.rating, later.category)
        ),
        reviews_per_thousand=thousand,
        reviews_per_day=None
        if per_day is None
        else _estimate_review_load(rates_before.review, rates_after.review, review_difference, per_day),
    )


def _summarize(side: Side) -> VerdictSummary | None:
    verdict = side.verdict
    if verdict is None:
        return None
    action = "review" if verdict.outcome == "needs_review" else verdict.action
    if action is None:  # a superseded submission has no answer about its image
        return None
    return VerdictSummary(
        action=action,
        rating=verdict.rating,
        category=verdict.category,
        score=verdict.score,
        rationale=verdict.rationale,
        reason=verdict.reason,
    )


def _count_failures(of: int, sides: Iterable[Side]) -> Failures:
    reasons = Counter(map(_parse_reason, sides))
    return Failures(all=compute_share(reasons.total(), of), by_reason=dict(reasons.most_common()))


def _parse_reason(side: Side) -> str:
    if side.verdict:
        return side.verdict.outcome
    # Sentences contain objects and sizes, so only the reason before the colon is counted.
    named = re.match(r"([a-z_]+)(?::|$)", side.error or "")
    return named[1] if named else "other"


def _compute_rates(policy: str, judged: Sequence[VerdictSummary]) -> ActionRates:
    actions = Counter(judgement.action for judgement in judged)
    return ActionRates(
        policy=policy,
        allow=compute_share(actions["allow"], len(judged)),
        review=compute_share(actions["review"], len(judged)),
        block=compute_share(actions["block"], len(judged)),
        unreadable=compute_share(sum(judgement.reason == "unreadable_answer" for judgement in judged), len(judged)),
    )


def _compute_difference(action: Action, pairs: Counter[tuple[Action, Action]]) -> ShareDifference:
    counts: Counter[tuple[bool, bool]] = Counter()
    for (before, after), count in pairs.items():
        counts[before == action, after == action] += count
    return compute_paired_difference(
        both=counts[True, True],
        before_only=counts[True, False],
        after_only=counts[False, True],
        neither=counts[False, False],
    )


def _estimate_review_load(
    before: Share, after: Share, difference: ShareDifference, submissions: float
) -> ReviewLoad | None:
    def estimate(value: float | None, interval: Interval | None) -> Estimate | None:
        if value is None or interval is None:
            return None
        return Estimate(value=value * submissions, interval=interval.times(submissions))

    earlier, later = estimate(before.share, before.interval), estimate(after.share, after.interval)
    change = estimate(difference.difference, difference.interval)
    return ReviewLoad(before=earlier, after=later, change=change) if earlier and later and change else None


def _group_flips(flips: Iterable[Flip]) -> tuple[FlipGroup, ...]:
    found: defaultdict[tuple[Action, Action, str], list[Flip]] = defaultdict(list)
    for flip in flips:
        severe = max(flip.after, flip.before, key=_rank_severity)  # max returns the first of equal values
        found[flip.before.action, flip.after.action, severe.category or UNREADABLE].append(flip)
    groups = [
        FlipGroup(before=before, after=after, category=category, flips=tuple(sorted(members, key=_by_change)))
        for (before, after, category), members in found.items()
    ]
    return tuple(sorted(groups, key=_by_weight))


def _rank_severity(judgement: VerdictSummary) -> tuple[int, float]:
    return _SEVERITY[judgement.action], -1.0 if judgement.score is None else judgement.score


def _by_change(flip: Flip) -> tuple[float, str, str]:
    before, after = flip.before.score, flip.after.score
    # An unreadable answer counts as the largest change.
    change = 1.0 if before is None or after is None else abs(after - before)
    return -change, flip.submission_id, flip.uri


def _by_weight(group: FlipGroup) -> tuple[int, int, str, str]:
    steps = abs(_SEVERITY[group.after] - _SEVERITY[group.before])
    return -steps, -len(group.flips), group.direction, group.category


def _compare(subject: str, figure: Share | ShareDifference, limit: float) -> str | None:
    value, unit = (figure.share, "%") if isinstance(figure, Share) else (figure.difference, " percentage points")
    comparison = f"the limit is {100 * limit:.4g}{unit}"
    if value is None:
        return f"{subject} is unknown, because no submission was judged; {comparison}."
    if value <= limit:
        return None
    count = figure.count if isinstance(figure, Share) else figure.after_only - figure.before_only
    return f"{subject} is {100 * value:.4g}{unit} ({count:,} of {figure.of:,} submissions); {comparison}."


def _write_summary(report: BacktestReport) -> Iterator[str]:
    before, after = report.before, report.after
    yield f"{before.policy} → {after.policy}: {report.pairs:,} submissions, {report.judged_both:,} judged under both"
    for rates, failures in ((before, report.failures_before), (after, report.failures_after)):
        if failures.all.count:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in failures.by_reason.items())
            yield f"not judged under {rates.policy}: {failures.all.count:,} ({reasons})"
    if not report.judged_both:
        yield "No submission was judged under both versions, so the difference between them is unknown."
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


def _format_number(value: float) -> str:
    return f"{value:,.1f}" if abs(value) < 100 else f"{value:,.0f}"

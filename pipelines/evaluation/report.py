"""Builds the report of an evaluation, and its summary for a terminal. Pure."""

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from pipelines.evaluation import curves
from pipelines.evaluation.bootstrap import RESAMPLES, Bootstrap, Figure, Floats, ratio
from pipelines.evaluation.metrics import (
    INVALID,
    SAFE,
    UNSAFE,
    CategoryRates,
    ConfusionRates,
    JudgedRows,
    policy_exception_rate,
    rates_by_category,
    rates_by_kind,
)
from pipelines.evaluation.results import STEPS, AdaptiveColumns, PerturbedColumns, ResultColumns
from pipelines.reporting.statistics import CONFIDENCE
from pipelines.reporting.text import escape_control_chars
from services.core.values import ModelIdentity

PERCENTILES: Final = (50, 90, 95, 99)
THRESHOLDS: Final = tuple(n / 20 for n in range(1, 20))
_NO_PAIRS: Final = "no row was judged both ways with answers that could be read"


class _FrozenModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class UnjudgedRow(_FrozenModel):
    """A row that could not be judged."""

    id: str
    reason: str
    detail: str


class Latency(_FrozenModel):
    """The milliseconds of a step while other rows are in flight. The step `total` includes waiting."""

    step: str
    percentiles: dict[int, Figure]


class Adaptive(_FrozenModel):
    """Effort `adaptive` compared with `full`, over the rows that were judged with both."""

    rows: int
    escalated: Figure
    """The share that the first look did not decide, so the rows were judged in full."""
    same_rating: Figure
    same_action: Figure
    missed: Figure
    """The share of the Unsafe rows found with `full` that `adaptive` judges Safe."""
    balanced_accuracy: Figure
    """Of the verdicts with `adaptive`."""


class Robustness(_FrozenModel):
    """The effect of a perturbation, over the images that were judged before and after."""

    perturbation: str
    rows: int
    flips: Figure
    """The share whose rating changes."""
    to_safe: Figure
    """The share of those judged Unsafe that become Safe: the gain of someone who evades moderation."""
    to_unsafe: Figure
    action_flips: Figure
    score_change: Figure
    """Mean absolute change of the score."""


class EvaluationReport(_FrozenModel):
    """The figures of an evaluation."""

    data_set: str
    policy: str
    models: tuple[ModelIdentity, ...]
    """The models that judged, without digests of prompts: each combination of waived categories has its own prompt."""
    calibrations: tuple[str, ...]
    """Digests of the calibrations that were applied to the scores."""
    rows: int
    judged: int
    failures: dict[str, int]
    """Rows that could not be judged, by reason."""
    problems: tuple[UnjudgedRow, ...]
    """The first rows that could not be judged."""
    images: int
    confidence: float
    resamples: int
    seed: int
    bins: int
    prevalence: float | None
    """The share of Unsafe images that the loads are computed for; None for that of the data set."""
    rates: dict[str, ConfusionRates]
    """The rates of all rows, and by what the policy of a row waives."""
    per: Figure
    categories: tuple[CategoryRates, ...]
    roc: curves.Curve
    precision_recall: curves.Curve
    calibration: curves.CalibrationFigures
    thresholds: tuple[curves.ThresholdCost, ...]
    policy_thresholds: tuple[float, float]
    """The thresholds of the policy for review and block."""
    latency: tuple[Latency, ...]
    adaptive: Adaptive | None
    robustness: tuple[Robustness, ...]

    def lines(self) -> list[str]:
        """A summary for a terminal."""
        return [escape_control_chars(line) for line in _summary_lines(self)]


def build_report(
    columns: ResultColumns,
    *,
    data_set: str,
    policy: str,
    policy_thresholds: tuple[float, float],
    seed: int = 0,
    resamples: int = RESAMPLES,
    prevalence: float | None = None,
) -> EvaluationReport:
    """The report on judged rows. Without any row, every figure is undefined."""
    rows = columns.rows()
    bootstrap = Bootstrap(rows.image, seed=seed, resamples=resamples)
    scored = rows.where(np.isfinite(rows.score))
    score_bootstrap = Bootstrap(_renumber(scored.image), seed=seed, resamples=resamples)
    unsafe, score = scored.expected.astype(np.float64), scored.score
    roc, precision_recall = curves.curves(unsafe, score, score_bootstrap)
    thresholds = (*THRESHOLDS, *policy_thresholds)
    adaptive = columns.adaptive()
    return EvaluationReport(
        data_set=data_set,
        policy=policy,
        models=tuple(columns.models),
        calibrations=tuple(columns.calibrations),
        rows=columns.judged + columns.failures.total(),
        judged=columns.judged,
        failures=dict(columns.failures.most_common()),
        problems=tuple(UnjudgedRow(id=name, reason=reason, detail=detail) for name, reason, detail in columns.examples),
        images=int(rows.image.max()) + 1 if len(rows) else 0,
        confidence=CONFIDENCE,
        resamples=bootstrap.resamples,
        seed=seed,
        bins=curves.BINS,
        prevalence=prevalence,
        rates=rates_by_kind(rows, bootstrap),
        per=policy_exception_rate(rows, bootstrap),
        categories=tuple(rates_by_category(rows, columns.names, bootstrap)),
        roc=roc,
        precision_recall=precision_recall,
        calibration=curves.calibration(unsafe, score, score_bootstrap),
        thresholds=tuple(curves.threshold_table(unsafe, score, score_bootstrap, thresholds, prevalence)),
        policy_thresholds=policy_thresholds,
        latency=tuple(_latency(step, columns.latency(step), bootstrap) for step in STEPS),
        adaptive=_compare_adaptive(rows, columns.actions(), adaptive, seed, resamples) if len(adaptive.rows) else None,
        robustness=tuple(
            _compare_perturbed(name, rows, columns.actions(), after, seed, resamples)
            for name, after in columns.perturbed().items()
        ),
    )


def _renumber(images: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.unique(images, return_inverse=True)[1].astype(np.int64)


def _latency(step: str, ms: Floats, bootstrap: Bootstrap) -> Latency:
    order = np.argsort(ms)
    ranked = ms[order]

    def statistic(weights: Floats) -> Floats:
        if not len(ranked):
            return np.full(len(PERCENTILES), np.nan)
        reached = np.cumsum(weights[order])
        places = np.searchsorted(reached, np.array(PERCENTILES) / 100 * reached[-1])
        found: Floats = ranked[np.minimum(places, len(ranked) - 1)]
        return found

    estimates = bootstrap(statistic)
    found = {p: estimates.figure(n, undefined="no row was judged") for n, p in enumerate(PERCENTILES)}
    return Latency(step=step, percentiles=found)


def _shares(
    parts: Sequence[tuple[NDArray[np.bool_], NDArray[np.bool_]]], bootstrap: Bootstrap, undefined: str
) -> list[Figure]:
    """For each pair, the share of the rows in the second that are also in the first."""

    def statistic(weights: Floats) -> Floats:
        return np.concatenate(
            [ratio(np.array([weights[part & whole].sum()]), np.array([weights[whole].sum()])) for part, whole in parts]
        )

    estimates = bootstrap(statistic)
    return [estimates.figure(n, of=int(whole.sum()), undefined=undefined) for n, (_, whole) in enumerate(parts)]


def _compare_adaptive(
    rows: JudgedRows, actions: NDArray[np.int8], after: AdaptiveColumns, seed: int, resamples: int
) -> Adaptive:
    before, action = rows.predicted[after.rows], actions[after.rows]
    both = (before != INVALID) & (after.predicted != INVALID)
    every = np.ones(len(after.rows), np.bool_)
    found = rows.expected[after.rows] & (before == UNSAFE) & both
    bootstrap = Bootstrap(_renumber(rows.image[after.rows]), seed=seed, resamples=resamples)
    escalated, same_rating, same_action, missed = _shares(
        [
            (after.escalated, every),
            (before == after.predicted, both),
            (action == after.action, every),
            (after.predicted == SAFE, found),
        ],
        bootstrap,
        _NO_PAIRS,
    )
    judged = JudgedRows(
        expected=rows.expected[after.rows],
        predicted=after.predicted,
        score=np.full(len(after.rows), np.nan),
        category=rows.category[after.rows],
        predicted_category=rows.predicted_category[after.rows],
        kind=rows.kind[after.rows],
        image=_renumber(rows.image[after.rows]),
    )
    return Adaptive(
        rows=len(after.rows),
        escalated=escalated,
        same_rating=same_rating,
        same_action=same_action,
        missed=missed,
        balanced_accuracy=rates_by_kind(judged, bootstrap)["all"].balanced_accuracy,
    )


def _compare_perturbed(
    name: str, rows: JudgedRows, actions: NDArray[np.int8], after: PerturbedColumns, seed: int, resamples: int
) -> Robustness:
    before, action, score = rows.predicted[after.rows], actions[after.rows], rows.score[after.rows]
    both = (before != INVALID) & (after.predicted != INVALID)
    bootstrap = Bootstrap(_renumber(rows.image[after.rows]), seed=seed, resamples=resamples)
    flips, to_safe, to_unsafe, action_flips = _shares(
        [
            (before != after.predicted, both),
            (after.predicted == SAFE, both & (before == UNSAFE)),
            (after.predicted == UNSAFE, both & (before == SAFE)),
            (action != after.action, np.ones(len(before), np.bool_)),
        ],
        bootstrap,
        _NO_PAIRS,
    )
    change = np.where(both, np.abs(after.score - score), 0.0)

    def mean_change(weights: Floats) -> Floats:
        return ratio(np.array([(weights * change).sum()]), np.array([weights[both].sum()]))

    return Robustness(
        perturbation=name,
        rows=int(both.sum()),
        flips=flips,
        to_safe=to_safe,
        to_unsafe=to_unsafe,
        action_flips=action_flips,
        score_change=bootstrap(mean_change).figure(0, undefined=_NO_PAIRS),
    )


def _summary_lines(report: EvaluationReport) -> Iterator[str]:
    every = report.rates["all"]
    yield f"{report.data_set} under {report.policy}: {report.judged:,} of {report.rows:,} rows judged"
    if report.failures:
        yield "not judged: " + ", ".join(f"{reason} {count:,}" for reason, count in report.failures.items())
    invalid = every.confusion.safe_invalid + every.confusion.unsafe_invalid
    yield f"{'':22}{'judged Safe':>12}{'Unsafe':>12}{'unreadable':>12}"
    c = every.confusion
    yield f"{'labelled Safe':22}{c.true_negatives:>12,}{c.false_positives:>12,}{c.safe_invalid:>12,}"
    yield f"{'labelled Unsafe':22}{c.false_negatives:>12,}{c.true_positives:>12,}{c.unsafe_invalid:>12,}"
    if invalid:
        yield f"answers that could not be read count as neither: {invalid:,}"
    for name in ("accuracy", "balanced_accuracy", "precision", "recall", "specificity", "f1"):
        yield _line(name.replace("_", " "), getattr(every, name))
    yield _line("policy exception rate", report.per)
    yield _line("ROC area", report.roc.area, percent=False)
    yield _line("average precision", report.precision_recall.area, percent=False)
    yield _line(f"ECE ({report.bins} bins)", report.calibration.ece, percent=False)
    if total := next((latency for latency in report.latency if latency.step == "total"), None):
        shown = [(p, figure.value) for p, figure in total.percentiles.items() if figure.value is not None]
        yield f"{'milliseconds':22}" + ", ".join(f"p{p} {value:,.0f}" for p, value in shown)
    if report.adaptive:
        yield _line("adaptive: escalated", report.adaptive.escalated)
        yield _line("adaptive: same rating", report.adaptive.same_rating)
        yield _line("adaptive: missed", report.adaptive.missed)
    for robust in report.robustness:
        yield _line(f"flips, {robust.perturbation}"[:30], robust.flips, width=32)


def _line(name: str, figure: Figure, *, percent: bool = True, width: int = 22) -> str:
    why = f": {figure.undefined}" if figure.undefined and figure.value is None else ""
    return f"{name:{width}}{figure.text(percent=percent)}{why}"

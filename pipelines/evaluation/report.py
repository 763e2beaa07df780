"""The figures of an evaluation, and how they read in a terminal. Pure."""

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
    Judged,
    per,
    rates_by_category,
    rates_by_kind,
)
from pipelines.evaluation.results import STEPS, AdaptiveColumns, Columns, PerturbedColumns
from pipelines.reporting.statistics import CONFIDENCE
from pipelines.reporting.text import escape_control_chars
from services.core.values import ModelIdentity

PERCENTILES: Final = (50, 90, 95, 99)
THRESHOLDS: Final = tuple(n / 20 for n in range(1, 20))
_PAIRS: Final = "no row was judged both ways with answers that could be read"


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RunWarning(_Value):
    """A row that could not be judged."""

    id: str
    reason: str
    detail: str


class Latency(_Value):
    """Milliseconds that rows spent in a step, with so many others in flight; total includes waiting."""

    step: str
    percentiles: dict[int, Figure]


class Adaptive(_Value):
    """What effort `adaptive` would change against `full`, over the rows that were judged with both."""

    rows: int
    escalated: Figure
    """Share that a first look did not settle, so that it was judged in full."""
    same_rating: Figure
    same_action: Figure
    missed: Figure
    """Share of the Unsafe rows found with `full` that `adaptive` judges Safe."""
    balanced_accuracy: Figure
    """With `adaptive`."""


class Robustness(_Value):
    """What a perturbation of the images changes, over those that were judged before and after."""

    perturbation: str
    rows: int
    flips: Figure
    """Share whose rating differs."""
    to_safe: Figure
    """Share of those judged Unsafe that become Safe: what someone who hides would gain."""
    to_unsafe: Figure
    action_flips: Figure
    score_change: Figure
    """Mean absolute change of the score."""


class EvaluationReport(_Value):
    """The outcome of an evaluation."""

    data_set: str
    policy: str
    models: tuple[ModelIdentity, ...]
    """What judged; the digests of prompts are left out, since every waiver makes its own."""
    calibrations: tuple[str, ...]
    """Digests of the maps that were applied to the scores."""
    rows: int
    judged: int
    failures: dict[str, int]
    """Rows that could not be judged, by reason."""
    problems: tuple[RunWarning, ...]
    """The first of them."""
    images: int
    confidence: float
    resamples: int
    seed: int
    bins: int
    prevalence: float | None
    """Share of Unsafe images that the loads are for; None: that of the data set."""
    rates: dict[str, ConfusionRates]
    """Of all rows, and of those whose policy waives nothing, other categories, or the violated one."""
    per: Figure
    categories: tuple[CategoryRates, ...]
    roc: curves.Curve
    precision_recall: curves.Curve
    calibration: curves.CalibrationFigures
    thresholds: tuple[curves.Threshold, ...]
    policy_thresholds: tuple[float, float]
    """Those of the policy for review and block."""
    latency: tuple[Latency, ...]
    adaptive: Adaptive | None
    robustness: tuple[Robustness, ...]

    def lines(self) -> list[str]:
        """A summary for a terminal."""
        return [escape_control_chars(line) for line in _summary(self)]


def summarize(
    columns: Columns,
    *,
    data_set: str,
    policy: str,
    policy_thresholds: tuple[float, float],
    seed: int = 0,
    resamples: int = RESAMPLES,
    prevalence: float | None = None,
) -> EvaluationReport:
    """The report on what was judged; of no rows at all every figure is undefined."""
    rows = columns.rows()
    draw = Bootstrap(rows.image, seed=seed, resamples=resamples)
    scored = rows.where(np.isfinite(rows.score))
    on_scores = Bootstrap(_numbered(scored.image), seed=seed, resamples=resamples)
    unsafe, score = scored.expected.astype(np.float64), scored.score
    roc, precision_recall = curves.curves(unsafe, score, on_scores)
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
        problems=tuple(RunWarning(id=name, reason=reason, detail=detail) for name, reason, detail in columns.examples),
        images=int(rows.image.max()) + 1 if len(rows) else 0,
        confidence=CONFIDENCE,
        resamples=draw.resamples,
        seed=seed,
        bins=curves.BINS,
        prevalence=prevalence,
        rates=rates_by_kind(rows, draw),
        per=per(rows, draw),
        categories=tuple(rates_by_category(rows, columns.names, draw)),
        roc=roc,
        precision_recall=precision_recall,
        calibration=curves.calibration(unsafe, score, on_scores),
        thresholds=tuple(curves.threshold_table(unsafe, score, on_scores, thresholds, prevalence)),
        policy_thresholds=policy_thresholds,
        latency=tuple(_latency(step, columns.latency(step), draw) for step in STEPS),
        adaptive=_adaptive(rows, columns.actions(), adaptive, seed, resamples) if len(adaptive.rows) else None,
        robustness=tuple(
            _robustness(name, rows, columns.actions(), after, seed, resamples)
            for name, after in columns.perturbed().items()
        ),
    )


def _numbered(images: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.unique(images, return_inverse=True)[1].astype(np.int64)


def _latency(step: str, ms: Floats, draw: Bootstrap) -> Latency:
    order = np.argsort(ms)
    ranked = ms[order]

    def statistic(weights: Floats) -> Floats:
        if not len(ranked):
            return np.full(len(PERCENTILES), np.nan)
        reached = np.cumsum(weights[order])
        places = np.searchsorted(reached, np.array(PERCENTILES) / 100 * reached[-1])
        found: Floats = ranked[np.minimum(places, len(ranked) - 1)]
        return found

    estimates = draw(statistic)
    found = {p: estimates.figure(n, undefined="no row was judged") for n, p in enumerate(PERCENTILES)}
    return Latency(step=step, percentiles=found)


def _shares(
    parts: Sequence[tuple[NDArray[np.bool_], NDArray[np.bool_]]], draw: Bootstrap, undefined: str
) -> list[Figure]:
    """For each pair the share of the rows in the second that are in the first, too."""

    def statistic(weights: Floats) -> Floats:
        return np.concatenate(
            [ratio(np.array([weights[part & whole].sum()]), np.array([weights[whole].sum()])) for part, whole in parts]
        )

    estimates = draw(statistic)
    return [estimates.figure(n, of=int(whole.sum()), undefined=undefined) for n, (_, whole) in enumerate(parts)]


def _adaptive(rows: Judged, actions: NDArray[np.int8], after: AdaptiveColumns, seed: int, resamples: int) -> Adaptive:
    before, action = rows.predicted[after.rows], actions[after.rows]
    both = (before != INVALID) & (after.predicted != INVALID)
    every = np.ones(len(after.rows), np.bool_)
    found = rows.expected[after.rows] & (before == UNSAFE) & both
    draw = Bootstrap(_numbered(rows.image[after.rows]), seed=seed, resamples=resamples)
    escalated, same_rating, same_action, missed = _shares(
        [
            (after.escalated, every),
            (before == after.predicted, both),
            (action == after.action, every),
            (after.predicted == SAFE, found),
        ],
        draw,
        _PAIRS,
    )
    judged = Judged(
        expected=rows.expected[after.rows],
        predicted=after.predicted,
        score=np.full(len(after.rows), np.nan),
        category=rows.category[after.rows],
        predicted_category=rows.predicted_category[after.rows],
        kind=rows.kind[after.rows],
        image=_numbered(rows.image[after.rows]),
    )
    return Adaptive(
        rows=len(after.rows),
        escalated=escalated,
        same_rating=same_rating,
        same_action=same_action,
        missed=missed,
        balanced_accuracy=rates_by_kind(judged, draw)["all"].balanced_accuracy,
    )


def _robustness(
    name: str, rows: Judged, actions: NDArray[np.int8], after: PerturbedColumns, seed: int, resamples: int
) -> Robustness:
    before, action, score = rows.predicted[after.rows], actions[after.rows], rows.score[after.rows]
    both = (before != INVALID) & (after.predicted != INVALID)
    draw = Bootstrap(_numbered(rows.image[after.rows]), seed=seed, resamples=resamples)
    flips, to_safe, to_unsafe, action_flips = _shares(
        [
            (before != after.predicted, both),
            (after.predicted == SAFE, both & (before == UNSAFE)),
            (after.predicted == UNSAFE, both & (before == SAFE)),
            (action != after.action, np.ones(len(before), np.bool_)),
        ],
        draw,
        _PAIRS,
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
        score_change=draw(mean_change).figure(0, undefined=_PAIRS),
    )


def _summary(report: EvaluationReport) -> Iterator[str]:
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

"""Builds the report of an evaluation, and its summary for a terminal. Pure."""

from collections.abc import Iterator
from typing import Final

import numpy as np

from pipelines.evaluation import curves
from pipelines.evaluation.bootstrap import RESAMPLES, Bootstrap, Floats, Metric
from pipelines.evaluation.comparisons import (
    Adaptive,
    Robustness,
    compare_adaptive,
    compare_perturbed,
    renumber_images,
)
from pipelines.evaluation.metrics import (
    CategoryRates,
    ConfusionRates,
    compute_policy_exception_rate,
    compute_rates_by_category,
    compute_rates_by_waiver_kind,
)
from pipelines.evaluation.results import STEPS, ResultColumns
from pipelines.reporting.frozen_model import FrozenModel
from pipelines.reporting.statistics import CONFIDENCE
from services.core.text import escape_control_chars
from services.core.values import ModelIdentity

PERCENTILES: Final = (50, 90, 95, 99)
THRESHOLDS: Final = tuple(n / 20 for n in range(1, 20))


class UnjudgedRow(FrozenModel):
    """A row that could not be judged."""

    id: str
    reason: str
    detail: str


class Latency(FrozenModel):
    """The milliseconds of a step while other rows are in flight. The step `total` includes waiting."""

    step: str
    percentiles: dict[int, Metric]


class EvaluationReport(FrozenModel):
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
    per: Metric
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
    score_bootstrap = Bootstrap(renumber_images(scored.image), seed=seed, resamples=resamples)
    unsafe, score = scored.expected.astype(np.float64), scored.score
    roc, precision_recall = curves.compute_roc_and_pr_curves(unsafe, score, score_bootstrap)
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
        rates=compute_rates_by_waiver_kind(rows, bootstrap),
        per=compute_policy_exception_rate(rows, bootstrap),
        categories=tuple(compute_rates_by_category(rows, columns.names, bootstrap)),
        roc=roc,
        precision_recall=precision_recall,
        calibration=curves.measure_calibration(unsafe, score, score_bootstrap),
        thresholds=tuple(curves.compute_threshold_costs(unsafe, score, score_bootstrap, thresholds, prevalence)),
        policy_thresholds=policy_thresholds,
        latency=tuple(_latency(step, columns.latency(step), bootstrap) for step in STEPS),
        adaptive=compare_adaptive(rows, columns.actions(), adaptive, seed, resamples) if len(adaptive.rows) else None,
        robustness=tuple(
            compare_perturbed(name, rows, columns.actions(), after, seed, resamples)
            for name, after in columns.perturbed().items()
        ),
    )


def _latency(step: str, ms: Floats, bootstrap: Bootstrap) -> Latency:
    order = np.argsort(ms)
    ranked = ms[order]

    def statistic(weights: Floats) -> Floats:
        if not len(ranked):
            return np.full(len(PERCENTILES), np.nan)
        reached = np.cumsum(weights[order])
        indexes = np.searchsorted(reached, np.array(PERCENTILES) / 100 * reached[-1])
        found: Floats = ranked[np.minimum(indexes, len(ranked) - 1)]
        return found

    estimates = bootstrap(statistic)
    found = {p: estimates.metric(n, undefined="no row was judged") for n, p in enumerate(PERCENTILES)}
    return Latency(step=step, percentiles=found)


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


def _line(name: str, figure: Metric, *, percent: bool = True, width: int = 22) -> str:
    why = f": {figure.undefined}" if figure.undefined and figure.value is None else ""
    return f"{name:{width}}{figure.text(percent=percent)}{why}"

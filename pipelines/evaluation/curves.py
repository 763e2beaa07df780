"""Measures the score: ROC and PR curves, calibration, and the cost of a threshold. Pure.

Rows without a score, because the answer was unreadable, are left out.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from sklearn.metrics import precision_recall_curve, roc_curve  # type: ignore[import-untyped]

from pipelines.evaluation.bootstrap import Bootstrap, Floats, Metric, ratio, sum_weights
from pipelines.reporting.frozen_model import FrozenModel

BINS: Final = 10
"""Bins of equal width, for the calibration error and the reliability plot."""
_POINTS_LIMIT: Final = 200
_ONE_CLASS: Final = "it takes Safe and Unsafe rows with a score"
_NO_SCORE: Final = "no row has a score"


class Curve(FrozenModel):
    """The points of a curve from left to right, and the area below it."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    area: Metric


class Bin(FrozenModel):
    """Rows whose score lies in [from, to); the last bin includes its end."""

    low: float
    high: float
    rows: int
    mean_score: float | None
    unsafe: Metric
    """The share labelled Unsafe."""


class CalibrationFigures(FrozenModel):
    """How close the score is to a probability."""

    ece: Metric
    """Expected calibration error: the distance between mean score and share of Unsafe rows in a bin, mean over rows."""
    brier: Metric
    """Mean squared distance between score and label."""
    bins: tuple[Bin, ...]


class ThresholdCost(FrozenModel):
    """The cost of a review of every image with this score or a higher one."""

    threshold: float
    load: Metric
    """The share of images to review."""
    misses: Metric
    """The share of Unsafe images that are not among these."""
    false_alarms: Metric
    """The share of Safe images that are."""


class Ranking:
    """Rows sorted by score once, so that areas for other weights need no further sorting."""

    def __init__(self, unsafe: Floats, score: Floats) -> None:
        self._order = np.argsort(-score, kind="stable")
        ranked = score[self._order]
        self._unsafe = unsafe[self._order]
        self._last_of_tie = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)

    def areas(self, weights: Floats) -> Floats:
        """The area under the ROC curve, and the average precision; NaN if a class has no weight."""
        weights = weights[self._order]
        positives = np.cumsum(weights * self._unsafe)[self._last_of_tie]
        negatives = np.cumsum(weights * (1 - self._unsafe))[self._last_of_tie]
        if not positives[-1] or not negatives[-1]:
            return np.full(2, np.nan)
        recall = np.concatenate([[0.0], positives / positives[-1]])
        fall_out = np.concatenate([[0.0], negatives / negatives[-1]])
        precision = ratio(positives, positives + negatives)
        steps = np.diff(recall)
        return np.array([np.trapezoid(recall, fall_out), np.sum(steps[steps > 0] * precision[steps > 0])])


def compute_roc_and_pr_curves(unsafe: Floats, score: Floats, bootstrap: Bootstrap) -> tuple[Curve, Curve]:
    """The ROC curve (fall-out, recall) and the precision-recall curve; the latter's area is the average precision."""
    if not 0 < unsafe.sum() < len(unsafe):
        undefined = Curve(x=(), y=(), area=Metric(value=None, undefined=_ONE_CLASS))
        return undefined, undefined
    areas = bootstrap(Ranking(unsafe, score).areas)
    fall_out, recall, _ = roc_curve(unsafe, score)
    precision, pr_recall, _ = precision_recall_curve(unsafe, score, drop_intermediate=True)
    return (
        _curve(fall_out, recall, areas.metric(0, undefined=_ONE_CLASS)),
        _curve(pr_recall[::-1], precision[::-1], areas.metric(1, undefined=_ONE_CLASS)),
    )


def measure_calibration(unsafe: Floats, score: Floats, bootstrap: Bootstrap) -> CalibrationFigures:
    """The calibration error over `BINS` bins of equal width, and the bins."""
    indexes = np.minimum((score * BINS).astype(np.int64), BINS - 1)
    squared = (score - unsafe) ** 2

    def sums(values: Floats, weights: Floats) -> Floats:
        return sum_weights(indexes, weights * values, BINS)

    def statistic(weights: Floats) -> Floats:
        rows = sum_weights(indexes, weights, BINS)
        labelled, scored = sums(unsafe, weights), sums(score, weights)
        total = np.array([rows.sum()])
        error = ratio(np.array([np.abs(labelled - scored).sum()]), total)
        brier = ratio(np.array([(weights * squared).sum()]), total)
        return np.concatenate([error, brier, ratio(labelled, rows)])

    estimates, ones = bootstrap(statistic), np.ones(len(score))
    rows = sum_weights(indexes, ones, BINS)
    means = ratio(sums(score, ones), rows)
    return CalibrationFigures(
        ece=estimates.metric(0, undefined=_NO_SCORE),
        brier=estimates.metric(1, undefined=_NO_SCORE),
        bins=tuple(
            Bin(
                low=index / BINS,
                high=(index + 1) / BINS,
                rows=int(rows[index]),
                mean_score=float(means[index]) if rows[index] else None,
                unsafe=estimates.metric(2 + index, of=int(rows[index]), undefined="no score lies here"),
            )
            for index in range(BINS)
        ),
    )


def expected_calibration_error(unsafe: Floats, score: Floats) -> float:
    """The calibration error over `BINS` bins, without an interval. There has to be at least one row."""
    indexes = np.minimum((score * BINS).astype(np.int64), BINS - 1)
    differences = sum_weights(indexes, unsafe - score, BINS)
    return float(np.abs(differences).sum() / len(score))


def compute_threshold_costs(
    unsafe: Floats, score: Floats, bootstrap: Bootstrap, thresholds: Sequence[float], prevalence: float | None = None
) -> list[ThresholdCost]:
    """The cost of each threshold, in rising order.

    `prevalence`: the share of Unsafe images that the load is computed for; None for the share among the rows.
    """
    bounds = np.array(sorted(set(thresholds)))
    above = np.searchsorted(bounds, score, side="right")  # the number of thresholds that the score reaches

    def reached(chosen: Floats) -> Floats:
        return sum_weights(above, chosen, len(bounds) + 1)[::-1].cumsum()[::-1]

    def statistic(weights: Floats) -> Floats:
        found, alarmed = reached(weights * unsafe), reached(weights * (1 - unsafe))
        recall, fall_out = ratio(found[1:], found[:1]), ratio(alarmed[1:], alarmed[:1])
        if prevalence is None:
            load = ratio(found[1:] + alarmed[1:], found[:1] + alarmed[:1])
        else:
            load = prevalence * recall + (1 - prevalence) * fall_out
        return np.concatenate([load, 1 - recall, fall_out])

    estimates, size = bootstrap(statistic), len(bounds)
    positives, negatives = int(unsafe.sum()), int(len(unsafe) - unsafe.sum())
    return [
        ThresholdCost(
            threshold=float(bound),
            load=estimates.metric(
                index,
                of=len(unsafe) if prevalence is None else None,
                undefined=_NO_SCORE if prevalence is None else _ONE_CLASS,
            ),
            misses=estimates.metric(size + index, of=positives, undefined="no Unsafe row has a score"),
            false_alarms=estimates.metric(2 * size + index, of=negatives, undefined="no Safe row has a score"),
        )
        for index, bound in enumerate(bounds)
    ]


def _curve(x: Floats, y: Floats, area: Metric) -> Curve:
    if len(x) > _POINTS_LIMIT:
        kept = np.unique(np.linspace(0, len(x) - 1, _POINTS_LIMIT).astype(int))
        x, y = x[kept], y[kept]
    return Curve(x=tuple(x.round(5).tolist()), y=tuple(y.round(5).tolist()), area=area)

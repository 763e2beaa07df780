"""Compares two verdicts on each image: effort `adaptive` with `full`, or a perturbed image with the original. Pure."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation.bootstrap import Bootstrap, Floats, Metric, ratio
from pipelines.evaluation.metrics import SAFE, UNREADABLE, UNSAFE, JudgedRows, compute_rates_by_waiver_kind
from pipelines.evaluation.results import AdaptiveColumns, PerturbedColumns
from pipelines.reporting.frozen_model import FrozenModel

_NO_PAIRS: Final = "no row was judged both ways with answers that could be read"


class Adaptive(FrozenModel):
    """Effort `adaptive` compared with `full`, over the rows that were judged with both."""

    rows: int
    escalated: Metric
    """The share that the first look did not decide, so the rows were judged in full."""
    same_rating: Metric
    same_action: Metric
    missed: Metric
    """The share of the Unsafe rows found with `full` that `adaptive` judges Safe."""
    balanced_accuracy: Metric
    """Of the verdicts with `adaptive`."""


class Robustness(FrozenModel):
    """The effect of a perturbation, over the images that were judged before and after."""

    perturbation: str
    rows: int
    flips: Metric
    """The share whose rating changes."""
    to_safe: Metric
    """The share of those judged Unsafe that become Safe: the gain of someone who evades moderation."""
    to_unsafe: Metric
    action_flips: Metric
    score_change: Metric
    """Mean absolute change of the score."""


def _shares(
    parts: Sequence[tuple[NDArray[np.bool_], NDArray[np.bool_]]], bootstrap: Bootstrap, undefined: str
) -> list[Metric]:
    """For each pair, the share of the rows in the second that are also in the first."""

    def statistic(weights: Floats) -> Floats:
        return np.concatenate(
            [ratio(np.array([weights[part & whole].sum()]), np.array([weights[whole].sum()])) for part, whole in parts]
        )

    estimates = bootstrap(statistic)
    return [estimates.metric(n, of=int(whole.sum()), undefined=undefined) for n, (_, whole) in enumerate(parts)]


def compare_adaptive(
    rows: JudgedRows, actions: NDArray[np.int8], after: AdaptiveColumns, seed: int, resamples: int
) -> Adaptive:
    before, action = rows.predicted[after.rows], actions[after.rows]
    both = (before != UNREADABLE) & (after.predicted != UNREADABLE)
    every = np.ones(len(after.rows), np.bool_)
    found = rows.expected[after.rows] & (before == UNSAFE) & both
    bootstrap = Bootstrap(renumber_images(rows.image[after.rows]), seed=seed, resamples=resamples)
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
        waiver_kind=rows.waiver_kind[after.rows],
        image=renumber_images(rows.image[after.rows]),
    )
    return Adaptive(
        rows=len(after.rows),
        escalated=escalated,
        same_rating=same_rating,
        same_action=same_action,
        missed=missed,
        balanced_accuracy=compute_rates_by_waiver_kind(judged, bootstrap)["all"].balanced_accuracy,
    )


def compare_perturbed(
    name: str, rows: JudgedRows, actions: NDArray[np.int8], after: PerturbedColumns, seed: int, resamples: int
) -> Robustness:
    before, action, score = rows.predicted[after.rows], actions[after.rows], rows.score[after.rows]
    both = (before != UNREADABLE) & (after.predicted != UNREADABLE)
    bootstrap = Bootstrap(renumber_images(rows.image[after.rows]), seed=seed, resamples=resamples)
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
        score_change=bootstrap(mean_change).metric(0, undefined=_NO_PAIRS),
    )


def renumber_images(images: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers of the images, counted from 0 without gaps."""
    return np.unique(images, return_inverse=True)[1].astype(np.int64)

"""Fits a map from scores to probabilities, and counts the actions that it would change. Pure.

Isotonic regression fits any non-decreasing shape, but needs many samples. Below `ISOTONIC_SAMPLES` the map is Platt's
logistic curve, with two parameters, over the log-odds of the score (J. Platt, Advances in Large Margin Classifiers,
1999, with his smoothed targets).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.isotonic import IsotonicRegression  # type: ignore[import-untyped]
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

from pipelines.evaluation.bootstrap import Floats
from pipelines.evaluation.curves import expected_calibration_error
from services.core.calibration import CalibrationMap, IsotonicMap, PlattMap, log_odds
from services.core.errors import ConfigurationError
from services.core.values import Action, Policy
from services.moderation.verdicts import decide

Method = Literal["isotonic", "platt"]

ISOTONIC_SAMPLES: Final = 1000
"""With fewer samples isotonic regression tends to overfit (scikit-learn's user guide, probability calibration)."""
MIN_CLASS_IMAGES: Final = 10
"""The images that each class has to have."""
_FOLDS: Final = 5
_KNOTS_LIMIT: Final = 128
_ACTIONS: Final[tuple[Action, ...]] = ("allow", "review", "block")


@dataclass(frozen=True, slots=True)
class CalibrationFit:
    """A fitted map, with the calibration error of the scores before and after it. A `CalibrationResult` contains it."""

    map: CalibrationMap
    samples: int
    unsafe: int
    ece_before: float
    ece_after: float
    """Of scores calibrated by maps that were fitted on other images (5 folds)."""
    brier_before: float
    brier_after: float
    """Of the same scores as `ece_after`."""


def fit_calibration(
    unsafe: Floats, score: Floats, images: NDArray[np.int64], *, method: Method | None = None, seed: int = 0
) -> CalibrationFit:
    """Fit a map on labelled scores.

    Args:
        unsafe: 1 for Unsafe, 0 for Safe.
        score: the guard's own score, in [0, 1].
        images: the number of the image of each row. All rows of an image are in the same fold.
        method: None for isotonic with at least `ISOTONIC_SAMPLES` samples, else Platt's.

    Raises:
        ConfigurationError: a class has too few images, or the share of Unsafe images does not rise with the score.
    """
    for name, label in (("Unsafe", 1), ("Safe", 0)):
        count = len(np.unique(images[unsafe == label]))
        if count < MIN_CLASS_IMAGES:
            raise ConfigurationError(
                f"a calibration takes {MIN_CLASS_IMAGES} judged images of each class, better some hundreds, and "
                f"{count} are {name}; add labelled images"
            )
    chosen = method or ("isotonic" if len(score) >= ISOTONIC_SAMPLES else "platt")
    fitted = _fit(unsafe, score, chosen)
    held_out = np.empty(len(score))
    fold = _folds(unsafe, images, seed)
    for number in range(_FOLDS):
        in_fold = fold == number
        held_out[in_fold] = apply_map(_fit(unsafe[~in_fold], score[~in_fold], chosen), score[in_fold])
    return CalibrationFit(
        map=fitted,
        samples=len(score),
        unsafe=int(unsafe.sum()),
        ece_before=expected_calibration_error(unsafe, score),
        ece_after=expected_calibration_error(unsafe, held_out),
        brier_before=float(np.mean((score - unsafe) ** 2)),
        brier_after=float(np.mean((held_out - unsafe) ** 2)),
    )


def apply_map(calibration: CalibrationMap, score: Floats) -> Floats:
    """The probabilities of scores."""
    return np.array([calibration.probability(float(each)) for each in score])


@dataclass(frozen=True, slots=True)
class ActionChanges:
    """The actions on the labelled rows before and after a calibration."""

    rows: dict[tuple[Action, Action], int]
    """The number of rows by action before and after."""
    unsafe_allowed: tuple[int, int]
    """Unsafe rows that are allowed, before and after."""
    safe_blocked: tuple[int, int]
    safe_reviewed: tuple[int, int]

    @property
    def changed(self) -> int:
        """The number of rows whose action changes."""
        return sum(count for (before, after), count in self.rows.items() if before != after)


def count_changes(
    unsafe: Floats, score: Floats, categories: Sequence[str | None], calibration: CalibrationMap, policy: Policy
) -> ActionChanges:
    """The actions by the policy's thresholds before and after a map; `categories` are those of the answers."""
    before = _decide_each(score, categories, policy)
    after = _decide_each(apply_map(calibration, score), categories, policy)
    found = Counter(zip(before, after, strict=True))

    def both(label: int, action: Action) -> tuple[int, int]:
        first, second = (
            sum(a == action and bool(u == label) for a, u in zip(side, unsafe, strict=True)) for side in (before, after)
        )
        return first, second

    return ActionChanges(
        rows={pair: found[pair] for pair in product(_ACTIONS, _ACTIONS) if found[pair]},
        unsafe_allowed=both(1, "allow"),
        safe_blocked=both(0, "block"),
        safe_reviewed=both(0, "review"),
    )


def _decide_each(score: Floats, categories: Sequence[str | None], policy: Policy) -> list[Action]:
    return [decide(float(each), category or "", policy) for each, category in zip(score, categories, strict=True)]


def _folds(unsafe: Floats, images: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """The fold of each row. Images are distributed by class, so each fold has its share of both classes."""
    rng = np.random.default_rng(seed)
    _, image = np.unique(images, return_inverse=True)
    of_class = np.bincount(image, weights=unsafe) > 0
    fold = np.empty(len(of_class), np.int64)
    for label in (True, False):
        members = rng.permutation(np.flatnonzero(of_class == label))
        fold[members] = np.arange(len(members)) % _FOLDS
    folds: NDArray[np.int64] = fold[image]
    return folds


def _fit(unsafe: Floats, score: Floats, method: Method) -> CalibrationMap:
    return _isotonic(unsafe, score) if method == "isotonic" else _platt(unsafe, score)


def _isotonic(unsafe: Floats, score: Floats) -> IsotonicMap:
    # No probability is 0 or 1 after n samples: Laplace's rule of succession bounds them.
    bound = 1 / (len(score) + 2)
    regression = IsotonicRegression(y_min=bound, y_max=1 - bound, increasing=True, out_of_bounds="clip")
    regression.fit(score, unsafe)
    x, y = regression.X_thresholds_, regression.y_thresholds_
    if len(x) < 2 or y[0] == y[-1]:
        raise _not_rising()
    if len(x) > _KNOTS_LIMIT:
        kept = np.unique(np.linspace(0, len(x) - 1, _KNOTS_LIMIT).round().astype(int))
        x, y = x[kept], y[kept]
    return IsotonicMap(scores=tuple(map(float, x)), probabilities=tuple(map(float, np.maximum.accumulate(y))))


def _platt(unsafe: Floats, score: Floats) -> PlattMap:
    odds = np.array([[log_odds(float(each))] for each in score])
    positives = unsafe.sum()
    negatives = len(unsafe) - positives
    target = np.where(unsafe == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    # A target between 0 and 1 is expressed as a weighted sample of each class.
    regression = LogisticRegression(C=np.inf, max_iter=1000)
    regression.fit(
        np.concatenate([odds, odds]),
        np.concatenate([np.ones(len(odds)), np.zeros(len(odds))]),
        sample_weight=np.concatenate([target, 1 - target]),
    )
    slope, intercept = float(regression.coef_[0, 0]), float(regression.intercept_[0])
    if slope <= 0:
        raise _not_rising()
    return PlattMap(slope=slope, intercept=intercept)


def _not_rising() -> ConfigurationError:
    return ConfigurationError(
        "no calibration can be fitted, because the share of Unsafe images in this data set does not rise with the "
        "score; check the labels"
    )

"""Fits the map from a score to a probability, and says what it would change. Pure.

Isotonic regression takes whatever shape rises, and needs many samples for it; below `ISOTONIC_FROM` it is Platt's
logistic curve, with two parameters, over the score's log-odds (J. Platt, Advances in Large Margin Classifiers, 1999,
with his smoothed targets).
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
from services.core.calibration import Calibration, IsotonicMap, PlattMap, log_odds
from services.core.errors import ConfigurationError
from services.core.values import Action, Policy, Thresholds

Method = Literal["isotonic", "platt"]

ISOTONIC_FROM: Final = 1000
"""Samples; with fewer, isotonic regression tends to overfit (scikit-learn's user guide, probability calibration)."""
LEAST_IMAGES: Final = 10
"""Of each class."""
_FOLDS: Final = 5
_KNOTS_LIMIT: Final = 128
_ACTIONS: Final[tuple[Action, ...]] = ("allow", "review", "block")


@dataclass(frozen=True, slots=True)
class Fit:
    """A map, and how much nearer to a probability it brings the score."""

    map: Calibration
    samples: int
    unsafe: int
    ece_before: float
    ece_after: float
    """Of scores that were each calibrated by a map fitted on the other images (5 folds)."""
    brier_before: float
    brier_after: float
    """As `ece_after`."""


def fit(
    unsafe: Floats, score: Floats, images: NDArray[np.int64], *, method: Method | None = None, seed: int = 0
) -> Fit:
    """Fit a map on labelled scores.

    Args:
        unsafe: 1 for Unsafe, 0 for Safe.
        score: the guard's own, in [0, 1].
        images: which image each is about: no image is on both sides of a fold.
        method: None for isotonic from `ISOTONIC_FROM` samples on, else Platt's.

    Raises:
        ConfigurationError: too few images of a class, or the score does not rise with the share of Unsafe images.
    """
    for name, label in (("Unsafe", 1), ("Safe", 0)):
        count = len(np.unique(images[unsafe == label]))
        if count < LEAST_IMAGES:
            raise ConfigurationError(
                f"a calibration takes {LEAST_IMAGES} images of each class that could be judged, better some hundreds; "
                f"{count} are {name}"
            )
    chosen = method or ("isotonic" if len(score) >= ISOTONIC_FROM else "platt")
    fitted = _fitted(unsafe, score, chosen)
    held_out = np.empty(len(score))
    fold = _folds(unsafe, images, seed)
    for number in range(_FOLDS):
        tried = fold == number
        held_out[tried] = applied(_fitted(unsafe[~tried], score[~tried], chosen), score[tried])
    return Fit(
        map=fitted,
        samples=len(score),
        unsafe=int(unsafe.sum()),
        ece_before=expected_calibration_error(unsafe, score),
        ece_after=expected_calibration_error(unsafe, held_out),
        brier_before=float(np.mean((score - unsafe) ** 2)),
        brier_after=float(np.mean((held_out - unsafe) ** 2)),
    )


def applied(calibration: Calibration, score: Floats) -> Floats:
    """What the map makes of scores."""
    return np.array([calibration.probability(float(each)) for each in score])


@dataclass(frozen=True, slots=True)
class Changes:
    """What a calibration would do to the actions on the labelled rows."""

    rows: dict[tuple[Action, Action], int]
    """By action before and after."""
    unsafe_allowed: tuple[int, int]
    """Unsafe rows that are allowed, before and after."""
    safe_blocked: tuple[int, int]
    safe_reviewed: tuple[int, int]

    @property
    def changed(self) -> int:
        """Rows whose action differs."""
        return sum(count for (before, after), count in self.rows.items() if before != after)


def changes(
    unsafe: Floats, score: Floats, categories: Sequence[str | None], calibration: Calibration, policy: Policy
) -> Changes:
    """What the policy's thresholds make of scores before and after; `categories` are those of the answers."""
    before = [_action(s, category, policy) for s, category in zip(score, categories, strict=True)]
    after = [_action(s, category, policy) for s, category in zip(applied(calibration, score), categories, strict=True)]
    found = Counter(zip(before, after, strict=True))

    def both(label: int, action: Action) -> tuple[int, int]:
        first, second = (
            sum(a == action and bool(u == label) for a, u in zip(side, unsafe, strict=True)) for side in (before, after)
        )
        return first, second

    return Changes(
        rows={pair: found[pair] for pair in product(_ACTIONS, _ACTIONS) if found[pair]},
        unsafe_allowed=both(1, "allow"),
        safe_blocked=both(0, "block"),
        safe_reviewed=both(0, "review"),
    )


def _action(score: float, category: str | None, policy: Policy) -> Action:
    thresholds: Thresholds = policy.category_thresholds.get(category or "", policy.thresholds)
    return "block" if score >= thresholds.block else "review" if score >= thresholds.review else "allow"


def _folds(unsafe: Floats, images: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """The fold of each row: images are dealt out by class, so that every fold has its share of both."""
    rng = np.random.default_rng(seed)
    _, place = np.unique(images, return_inverse=True)
    of_class = np.bincount(place, weights=unsafe) > 0
    fold = np.empty(len(of_class), np.int64)
    for label in (True, False):
        members = rng.permutation(np.flatnonzero(of_class == label))
        fold[members] = np.arange(len(members)) % _FOLDS
    dealt: NDArray[np.int64] = fold[place]
    return dealt


def _fitted(unsafe: Floats, score: Floats, method: Method) -> Calibration:
    return _isotonic(unsafe, score) if method == "isotonic" else _platt(unsafe, score)


def _isotonic(unsafe: Floats, score: Floats) -> IsotonicMap:
    # Nothing is certain after n samples: the ends are those of Laplace's rule of succession.
    doubt = 1 / (len(score) + 2)
    regression = IsotonicRegression(y_min=doubt, y_max=1 - doubt, increasing=True, out_of_bounds="clip")
    regression.fit(score, unsafe)
    x, y = regression.X_thresholds_, regression.y_thresholds_
    if len(x) < 2 or y[0] == y[-1]:
        raise _useless()
    if len(x) > _KNOTS_LIMIT:
        kept = np.unique(np.linspace(0, len(x) - 1, _KNOTS_LIMIT).round().astype(int))
        x, y = x[kept], y[kept]
    return IsotonicMap(scores=tuple(map(float, x)), probabilities=tuple(map(float, np.maximum.accumulate(y))))


def _platt(unsafe: Floats, score: Floats) -> PlattMap:
    odds = np.array([[log_odds(float(each))] for each in score])
    positives = unsafe.sum()
    negatives = len(unsafe) - positives
    target = np.where(unsafe == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    # A target between 0 and 1 is a sample of each class, weighted.
    regression = LogisticRegression(C=np.inf, max_iter=1000)
    regression.fit(
        np.concatenate([odds, odds]),
        np.concatenate([np.ones(len(odds)), np.zeros(len(odds))]),
        sample_weight=np.concatenate([target, 1 - target]),
    )
    slope, intercept = float(regression.coef_[0, 0]), float(regression.intercept_[0])
    if slope <= 0:
        raise _useless()
    return PlattMap(slope=slope, intercept=intercept)


def _useless() -> ConfigurationError:
    return ConfigurationError(
        "a higher score does not mean a larger share of Unsafe images on this data set, so no map that rises makes a "
        "probability of it; are the labels right?"
    )

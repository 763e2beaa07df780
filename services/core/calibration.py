"""Calibrations: monotone maps from the guard's score to a probability.

A calibration belongs to one policy version and one checkpoint. `pipelines.evaluation.calibration_fit` fits it on
labelled images. The functions here are pure.
"""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from functools import cached_property
from itertools import pairwise
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

_MIN_DISTANCE: Final = 1e-6
"""The smallest distance of a score from 0 and 1 when its log-odds are computed."""

Probability = Annotated[float, Field(ge=0, le=1)]
Knots = Annotated[tuple[Probability, ...], Field(min_length=2, max_length=256)]
"""One coordinate (score or probability) of the points between which the map is linear."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _MonotoneMap(_Value, ABC):
    @abstractmethod
    def probability(self, score: float) -> float:
        """Map a score in [0, 1] to P(Unsafe) in [0, 1]. A higher score never gets a lower probability."""

    @cached_property
    def digest(self) -> str:
        """`sha256:<hex>` of the map. Equal maps have equal digests."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"


class IsotonicMap(_MonotoneMap):
    """Linear interpolation between knots. Outside of the knots the probability is that of the nearest knot."""

    method: Literal["isotonic"] = "isotonic"
    scores: Knots
    """Strictly increasing."""
    probabilities: Knots
    """Never decreasing."""

    @model_validator(mode="after")
    def _check_knots(self) -> Self:
        if len(self.scores) != len(self.probabilities):
            raise ValueError("scores and probabilities must have the same length")
        if any(a >= b for a, b in pairwise(self.scores)) or any(a > b for a, b in pairwise(self.probabilities)):
            raise ValueError("scores must increase strictly, and probabilities must not decrease")
        return self

    def probability(self, score: float) -> float:
        if score <= self.scores[0]:
            return self.probabilities[0]
        if score >= self.scores[-1]:
            return self.probabilities[-1]
        right = bisect_left(self.scores, score)
        (x0, x1), (y0, y1) = self.scores[right - 1 : right + 1], self.probabilities[right - 1 : right + 1]
        return min(y1, y0 + (y1 - y0) * (score - x0) / (x1 - x0))


class PlattMap(_MonotoneMap):
    """A logistic curve over the score's log-odds: sigmoid(slope * log(score / (1 - score)) + intercept)."""

    method: Literal["platt"] = "platt"
    slope: Annotated[float, Field(gt=0)]
    intercept: float

    def probability(self, score: float) -> float:
        z = self.slope * log_odds(score) + self.intercept
        return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


CalibrationMap = Annotated[IsotonicMap | PlattMap, Field(discriminator="method")]


class StoredCalibration(_Value):
    """A map as the policy bucket stores it, with the figures of its fit."""

    version: int
    """Version of the policy."""
    revision: str
    """Revision of the checkpoint."""
    map: CalibrationMap
    samples: int
    """Number of labelled images in the fit."""
    unsafe: int
    """Number of unsafe images among them."""
    ece_before: float
    """Expected calibration error of the guard's own scores for these images, in [0, 1]."""
    ece_after: float
    """The same for calibrated scores. Each was calibrated by a map that was fitted without its image."""


def log_odds(score: float) -> float:
    """log(score / (1 - score)). A score of 0 or 1 counts as 1e-6 away from it, so that the result is finite."""
    bounded = min(max(score, _MIN_DISTANCE), 1 - _MIN_DISTANCE)
    return math.log(bounded / (1 - bounded))

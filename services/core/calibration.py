"""From the guard's score to a probability: a monotone map, fitted on labelled images for one policy version and one
checkpoint. What fits it is elsewhere; here are its value and what it makes of a score. Pure.
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

_CLOSEST: Final = 1e-6
"""How close to 0 and 1 a score may be before its log-odds are taken."""

Probability = Annotated[float, Field(ge=0, le=1)]
Knots = Annotated[tuple[Probability, ...], Field(min_length=2, max_length=256)]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class _Map(_Value, ABC):
    @abstractmethod
    def probability(self, score: float) -> float:
        """P(Unsafe) in [0, 1] of a score in [0, 1]; never lower for a higher score."""

    @cached_property
    def digest(self) -> str:
        """`sha256:<hex>` of the map; equal maps have equal digests."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"


class IsotonicMap(_Map):
    """Straight lines between knots; beyond the first and the last one the probability stays."""

    method: Literal["isotonic"] = "isotonic"
    scores: Knots
    """Rising strictly."""
    probabilities: Knots
    """Never falling."""

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if len(self.scores) != len(self.probabilities):
            raise ValueError("a knot has a score and a probability")
        if any(a >= b for a, b in pairwise(self.scores)) or any(a > b for a, b in pairwise(self.probabilities)):
            raise ValueError("knots have to rise")
        return self

    def probability(self, score: float) -> float:
        if score <= self.scores[0]:
            return self.probabilities[0]
        if score >= self.scores[-1]:
            return self.probabilities[-1]
        right = bisect_left(self.scores, score)
        (x0, x1), (y0, y1) = self.scores[right - 1 : right + 1], self.probabilities[right - 1 : right + 1]
        return min(y1, y0 + (y1 - y0) * (score - x0) / (x1 - x0))


class PlattMap(_Map):
    """A logistic curve over the score's log-odds: sigmoid(slope * log(score / (1 - score)) + intercept)."""

    method: Literal["platt"] = "platt"
    slope: Annotated[float, Field(gt=0)]
    intercept: float

    def probability(self, score: float) -> float:
        z = self.slope * log_odds(score) + self.intercept
        return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


Calibration = Annotated[IsotonicMap | PlattMap, Field(discriminator="method")]


class FittedCalibration(_Value):
    """A map, and how it was come by."""

    version: int
    """Of the policy."""
    revision: str
    """Of the checkpoint."""
    map: Calibration
    samples: int
    """Labelled images that it was fitted on."""
    unsafe: int
    """Unsafe ones among them."""
    ece_before: float
    """Expected calibration error of the guard's own scores on them, in [0, 1]."""
    ece_after: float
    """The same of the calibrated ones; each was calibrated by a map fitted on others."""


def log_odds(score: float) -> float:
    """log(score / (1 - score)), bounded: a score of 0 or 1 says no more than a millionth of doubt."""
    bounded = min(max(score, _CLOSEST), 1 - _CLOSEST)
    return math.log(bounded / (1 - bounded))

"""Confidence intervals by the bootstrap: images are drawn again and again, with replacement. Pure, and seeded.

What is drawn is the image, not the row: the rows of one image, under several policies, say much the same. A resample
is a weight for each row, so that a statistic is a function of weights and needs no copies of the rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from pipelines.reporting.statistics import CONFIDENCE, share

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""From the weights of the rows to some figures at once; NaN where one is not defined."""

RESAMPLES: Final = 1000
_WEIGHTS_LIMIT: Final = 20_000_000
"""Weights to draw for one statistic; above it there are fewer resamples."""
_RESAMPLES_LEAST: Final = 200
_DEFINED_LEAST: Final = 0.5
"""Share of the resamples in which a figure has to be defined to have an interval."""


class Figure(BaseModel):
    """A figure with its 95 % confidence interval, or why it has none."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    value: float | None
    low: float | None = None
    high: float | None = None
    of: int | None = None
    """How many rows it is about, where it is a share of rows."""
    undefined: str | None = None
    """Why there is no value."""

    def text(self, *, percent: bool = True) -> str:
        """Such as `97.5 % (95.1 to 98.8)`."""
        if self.value is None:
            return "undefined"
        factor, digits, unit = (100, 1, " %") if percent else (1, 3, "")
        if self.low is None or self.high is None:
            return f"{factor * self.value:.{digits}f}{unit}"
        interval = f"{factor * self.low:.{digits}f} to {factor * self.high:.{digits}f}"
        return f"{factor * self.value:.{digits}f}{unit} ({interval})"


@dataclass(frozen=True, slots=True)
class Estimates:
    """Some figures of one statistic, each with the ends of its interval; NaN where it is not defined."""

    value: Floats
    low: Floats
    high: Floats

    def figure(self, place: int, *, undefined: str, of: int | None = None) -> Figure:
        """One of them. `of`: the rows that it is a share of; `undefined`: why it may have no value.

        Where every resample comes to the same 0 or 1, the interval of a share is Wilson's, and another figure has none:
        a bootstrap cannot draw what was never seen, and its interval of no width would claim certainty.
        """
        value, low, high = (float(ends[place]) for ends in (self.value, self.low, self.high))
        if np.isnan(value) or of == 0:
            return Figure(value=None, of=of, undefined=undefined)
        if low == high == value and value in (0.0, 1.0):
            wilson = share(round(value * of), of).interval if of else None
            return Figure(value=value, of=of, low=wilson and wilson.low, high=wilson and wilson.high)
        if np.isnan(low) or np.isnan(high):
            return Figure(value=value, of=of)
        return Figure(value=value, low=low, high=high, of=of)


class Bootstrap:
    """Draws images; each call takes the same draws."""

    def __init__(self, images: NDArray[np.int64], *, seed: int, resamples: int = RESAMPLES) -> None:
        """`images`: which image each row is about, as numbers from 0 on."""
        self._images = images
        self._count = int(images.max()) + 1 if len(images) else 0
        self._seed = seed
        fitting = _WEIGHTS_LIMIT // max(1, len(images))
        self.resamples = min(resamples, max(_RESAMPLES_LEAST, fitting))

    def __call__(self, statistic: Statistic) -> Estimates:
        """The figures of all rows, and the ends of their intervals by percentiles of the resamples."""
        value = statistic(np.ones(len(self._images)))
        if not len(self._images):
            return Estimates(value, value * np.nan, value * np.nan)
        rng = np.random.default_rng(self._seed)
        drawn = np.empty((self.resamples, len(value)))
        for number in range(self.resamples):
            times = np.bincount(rng.integers(self._count, size=self._count), minlength=self._count)
            drawn[number] = statistic(times[self._images].astype(np.float64))
        tail = 100 * (1 - CONFIDENCE) / 2
        low, high = np.full(len(value), np.nan), np.full(len(value), np.nan)
        enough = np.isfinite(drawn).mean(axis=0) >= _DEFINED_LEAST
        if enough.any():
            low[enough], high[enough] = np.nanpercentile(drawn[:, enough], [tail, 100 - tail], axis=0)
        return Estimates(value, low, high)


def ratio(part: Floats, whole: Floats) -> Floats:
    """`part / whole`, NaN where the whole is 0."""
    quotient: Floats = np.full(np.broadcast(part, whole).shape, np.nan)
    return np.divide(part, whole, out=quotient, where=whole != 0)


def counts(places: NDArray[np.int64], weights: Floats, size: int) -> Floats:
    """The weights by place, of which there are `size`."""
    return np.bincount(places, weights=weights, minlength=size).astype(np.float64)

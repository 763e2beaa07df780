"""Computes confidence intervals by the bootstrap: images are drawn repeatedly, with replacement. Pure, and seeded.

Images are drawn, not rows, because the rows of one image under several policies are not independent. A resample is a
weight for each row, so a statistic is a function of weights and needs no copies of the rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from pipelines.reporting.statistics import CONFIDENCE, compute_share

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""Computes figures from the weights of the rows; NaN for a figure that is not defined."""

RESAMPLES: Final = 1000
_MAX_WEIGHTS: Final = 20_000_000
"""The most weights drawn for one statistic. More rows get fewer resamples."""
_MIN_RESAMPLES: Final = 200
_MIN_DEFINED_SHARE: Final = 0.5
"""A figure has an interval if it is defined in at least this share of the resamples."""


class Metric(BaseModel):
    """A metric with its 95 % confidence interval, or the reason why it is undefined."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    value: float | None
    low: float | None = None
    high: float | None = None
    of: int | None = None
    """The number of rows, if the figure is a share of rows."""
    undefined: str | None = None
    """Why the figure has no value."""

    def text(self, *, percent: bool = True) -> str:
        """The figure as text, such as `97.5 % (95.1 to 98.8)`."""
        if self.value is None:
            return "undefined"
        factor, digits, unit = (100, 1, " %") if percent else (1, 3, "")
        if self.low is None or self.high is None:
            return f"{factor * self.value:.{digits}f}{unit}"
        interval = f"{factor * self.low:.{digits}f} to {factor * self.high:.{digits}f}"
        return f"{factor * self.value:.{digits}f}{unit} ({interval})"


@dataclass(frozen=True, slots=True)
class Estimates:
    """The figures of one statistic, each with the ends of its interval; NaN if not defined."""

    value: Floats
    low: Floats
    high: Floats

    def metric(self, index: int, *, undefined: str, of: int | None = None) -> Metric:
        """One figure. `of`: the number of rows that it is a share of; `undefined`: why it may have no value.

        If every resample gives the same 0 or 1, a share gets Wilson's interval and another figure gets none: the
        bootstrap cannot draw errors that did not occur, so its interval would have no width and claim certainty.
        """
        value, low, high = (float(ends[index]) for ends in (self.value, self.low, self.high))
        if np.isnan(value) or of == 0:
            return Metric(value=None, of=of, undefined=undefined)
        if low == high == value and value in (0.0, 1.0):
            wilson = compute_share(round(value * of), of).interval if of else None
            return Metric(value=value, of=of, low=wilson and wilson.low, high=wilson and wilson.high)
        if np.isnan(low) or np.isnan(high):
            return Metric(value=value, of=of)
        return Metric(value=value, low=low, high=high, of=of)


class Bootstrap:
    """Draws resamples of images. Each call uses the same ones."""

    def __init__(self, images: NDArray[np.int64], *, seed: int, resamples: int = RESAMPLES) -> None:
        """`images`: the number of the image of each row, from 0."""
        self._images = images
        self._count = int(images.max()) + 1 if len(images) else 0
        self._seed = seed
        fitting = _MAX_WEIGHTS // max(1, len(images))
        self.resamples = min(resamples, max(_MIN_RESAMPLES, fitting))

    def __call__(self, statistic: Statistic) -> Estimates:
        """The figures over all rows, with intervals by percentiles of the resamples."""
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
        enough = np.isfinite(drawn).mean(axis=0) >= _MIN_DEFINED_SHARE
        if enough.any():
            low[enough], high[enough] = np.nanpercentile(drawn[:, enough], [tail, 100 - tail], axis=0)
        return Estimates(value, low, high)


def ratio(part: Floats, whole: Floats) -> Floats:
    """`part / whole`; NaN if the whole is 0."""
    quotient: Floats = np.full(np.broadcast(part, whole).shape, np.nan)
    return np.divide(part, whole, out=quotient, where=whole != 0)


def sum_weights(indexes: NDArray[np.int64], weights: Floats, size: int) -> Floats:
    """The sum of the weights at each of `size` indexes."""
    return np.bincount(indexes, weights=weights, minlength=size).astype(np.float64)

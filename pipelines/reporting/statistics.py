"""Computes confidence intervals of shares and of the difference between two shares. Pure."""

import math
from typing import Final, Self

from scipy.stats import binomtest

from pipelines.reporting.frozen_model import FrozenModel

CONFIDENCE: Final = 0.95
"""The confidence level of every interval in the reports."""


class Interval(FrozenModel):
    """A 95 % confidence interval, in the unit of its figure."""

    low: float
    high: float

    def times(self, factor: float) -> Self:
        """The interval of the figure times `factor`, which is not negative."""
        return type(self)(low=self.low * factor, high=self.high * factor)


class Share(FrozenModel):
    """The share `count` of `of`. It is unknown if `of` is 0."""

    count: int
    of: int
    share: float | None
    """In [0, 1]."""
    interval: Interval | None
    """Wilson's score interval."""

    def __str__(self) -> str:
        if self.share is None or self.interval is None:
            return "unknown"
        return f"{self.share:.1%} ({self.interval.low:.1%} to {self.interval.high:.1%})"


class ShareDifference(FrozenModel):
    """The change of a share over the same submissions, after minus before. It is unknown if there are none."""

    before_only: int
    """Submissions that count only before."""
    after_only: int
    """Submissions that count only after."""
    of: int
    difference: float | None
    """After minus before, in [-1, 1]."""
    interval: Interval | None

    def __str__(self) -> str:
        if self.difference is None or self.interval is None:
            return "unknown"
        low, high = self.interval.low, self.interval.high
        return f"{100 * self.difference:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"


def compute_share(count: int, of: int) -> Share:
    """Compute `count` of `of` with Wilson's score interval (E. B. Wilson, J. Am. Stat. Assoc. 22, 1927, 209-212)."""
    if of == 0:
        return Share(count=count, of=of, share=None, interval=None)
    return Share(count=count, of=of, share=count / of, interval=_wilson_interval(count, of))


def compute_paired_difference(*, both: int, before_only: int, after_only: int, neither: int) -> ShareDifference:
    """Compute the difference of two shares of the same submissions, after minus before, from the counts of the pairs.

    The interval is Newcombe's hybrid score interval for paired data, his method 10, with the correction of phi for
    continuity (R. G. Newcombe, Statistics in Medicine 17, 1998, 2635-2650). Unlike Wald's interval, it has a width if
    nothing differs, and it stays within [-1, 1].
    """
    of = both + before_only + after_only + neither
    if of == 0:
        return ShareDifference(before_only=0, after_only=0, of=0, difference=None, interval=None)
    count_before, count_after = both + before_only, both + after_only
    before, after = _wilson_interval(count_before, of), _wilson_interval(count_after, of)
    share_before, share_after = count_before / of, count_after / of
    agreement = float(both * neither - before_only * after_only)
    if agreement > 0:
        agreement = max(agreement - of / 2, 0.0)
    spread = math.sqrt(count_before * (of - count_before) * count_after * (of - count_after))
    phi = agreement / spread if spread else 0.0

    def reach(one: float, other: float) -> float:
        # Rounding can leave a tiny negative number where the two terms cancel.
        return math.sqrt(max(one**2 - 2 * phi * one * other + other**2, 0.0))

    difference = (after_only - before_only) / of
    low = difference - reach(share_after - after.low, before.high - share_before)
    high = difference + reach(after.high - share_after, share_before - before.low)
    return ShareDifference(
        before_only=before_only,
        after_only=after_only,
        of=of,
        difference=difference,
        interval=Interval(low=max(low, -1.0), high=min(high, 1.0)),
    )


def _wilson_interval(count: int, of: int) -> Interval:
    found = binomtest(count, of).proportion_ci(confidence_level=CONFIDENCE, method="wilson")
    return Interval(low=float(found.low), high=float(found.high))

"""A day of submissions: a curve with a night and an evening, sudden spikes, and randomness."""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

ArrivalCounts = npt.NDArray[np.int64]
DAY_S: Final = 86_400
WARM_UP_S: Final = 3600
"""Time that is simulated before the day, so that the day does not begin with an empty cluster. It does not count."""


@dataclass(frozen=True, slots=True)
class LoadProfile:
    """The shape of a day. Rates are submissions a second."""

    mean_rate: float = 100.0
    night_share: float = 0.35
    """Rate of the quietest hour, as a share of the busiest hour's."""
    spikes: int = 6
    """Spikes in a day. The last one has ten times the load of its hour, the others two to five times."""
    hold_s: tuple[float, float] = (180.0, 1500.0)
    """Duration of a spike without its slopes, at least and at most."""
    slope_s: tuple[float, float] = (20.0, 240.0)
    """Time in which a spike rises, at least and at most. It takes twice as long to fall."""


def draw_arrivals(load: LoadProfile, seed: int) -> ArrivalCounts:
    """Return the submissions in every second of the warm-up and of the day."""
    rng = np.random.default_rng(seed)
    at_s = np.arange(WARM_UP_S + DAY_S) - WARM_UP_S
    phase = 2 * np.pi * (at_s / DAY_S - 20 / 24)  # busiest at eight in the evening
    curve = 1 + 0.25 * np.cos(2 * phase) * (1 - load.night_share) / 2
    curve *= load.night_share + (1 - load.night_share) * (1 + np.cos(phase)) / 2
    rate = load.mean_rate * curve / curve.mean()
    drift = np.exp(_draw_drift(len(at_s), rng))
    rate *= drift / drift.mean()
    factor = np.ones(len(at_s))
    for number in range(load.spikes):
        height = 10.0 if number == load.spikes - 1 else rng.uniform(2, 5)
        start_s = rng.uniform(0, DAY_S)
        rise_s, hold_s = rng.uniform(*load.slope_s), rng.uniform(*load.hold_s)
        corners_s = start_s + np.cumsum([0, rise_s, hold_s, 2 * rise_s])
        factor = np.maximum(factor, np.interp(at_s, corners_s, [1, height, height, 1]))
    counts: ArrivalCounts = rng.poisson(rate * factor).astype(np.int64)
    return counts


def _draw_drift(seconds: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return a slow random walk around 0, about 10 % over half an hour, so that no curve is known in advance."""
    steps = rng.normal(0, 0.07, seconds // 600 + 2)
    level = np.zeros(len(steps))
    for i in range(1, len(steps)):
        level[i] = 0.8 * level[i - 1] + steps[i]
    drift: npt.NDArray[np.float64] = np.interp(np.arange(seconds), 600 * np.arange(len(steps)), level)
    return drift

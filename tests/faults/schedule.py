"""Which fault comes when: decided by a seed, before anything runs."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

Kind = Literal[
    "member killed",
    "member frozen",
    "member added",
    "member removed",
    "guard killed",
    "broker killed",
    "cache restarted",
    "S3 slow",
    "S3 throttled",
    "S3 erroneous",
    "S3 hanging",
    "S3 broken_off",
    "network cut",
    "network hanging",
]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)

_PAUSE_S: Final = (0.3, 3.0)
_LASTS_S: Final = (0.5, 8.0)


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong, while those before it may still last."""

    kind: Kind
    after_s: float
    """Since the fault before it began."""
    lasts_s: float
    """Until it is mended; nothing where it happens in a moment."""
    choice: float
    """In [0, 1): which of those that it can strike."""


def schedule(seed: int, rounds: int) -> Sequence[Fault]:
    """Each kind once a round, in another order every time."""
    dice = random.Random(f"faults {seed}")
    faults = []
    for _ in range(rounds):
        for kind in dice.sample(KINDS, len(KINDS)):
            # Short ones more often: most outages are, and the long ones find other faults.
            lasts_s = min(dice.uniform(*_LASTS_S), dice.uniform(*_LASTS_S))
            faults.append(Fault(kind, dice.uniform(*_PAUSE_S), lasts_s, dice.random()))
    return faults

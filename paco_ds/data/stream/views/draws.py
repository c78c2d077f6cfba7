"""Single random draws made from `rng.random()`: numpy's other methods take ten times as long for one number."""

from __future__ import annotations

import numpy as np


def uniform(low: float, high: float, rng: np.random.Generator) -> float:
    """A number from low to high."""
    return low + (high - low) * rng.random()


def below(end: int, rng: np.random.Generator) -> int:
    """An integer from 0 to end - 1; the bias is at most end / 2^53."""
    return int(end * rng.random())


def happens(probability: float, rng: np.random.Generator) -> bool:
    """True with this probability: never at 0, always at 1."""
    return rng.random() < probability

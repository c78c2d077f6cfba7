"""Intervals of the difference of two methods' accuracies: a bootstrap over seeds and test images.

Shapes: S seeds, N images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from paco_ds.errors import UserError

Correct = npt.NDArray[np.bool_]
REPLICATES, LEVEL = 2000, 0.95


@dataclass(frozen=True)
class Difference:
    """The difference of two accuracies over all images, as a fraction, with its 95 % interval."""

    mean: float
    low: float
    high: float
    seeds: int
    images: int

    def __str__(self) -> str:
        mean, interval = self.parts()
        over = f"{self.seeds} seed{'s' * (self.seeds > 1)} and {self.images} images"
        return f"{mean} points, {LEVEL:.0%} bootstrap interval {interval} over {over}"

    def parts(self) -> tuple[str, str]:
        """(mean, interval) in points, as text."""
        mean, low, high = (f"{100 * value:+.1f}" for value in (self.mean, self.low, self.high))
        return mean, f"{low} to {high}"


def paired_difference(ours: Mapping[int, Correct], theirs: Mapping[int, Correct]) -> Difference:
    """The mean difference and its percentile interval, paired by image and by seed.

    Each replicate draws the common seeds and, independently, the images with replacement, so the interval has both what
    another seed and what another test set would change. With one seed it has the images' part alone. With few seeds it
    is too narrow: three have only ten combinations.

    Args:
        ours, theirs: bool [N] by seed: which images were classified right.

    Raises:
        UserError: no seed in common, or other numbers of images.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        raise UserError(
            "the runs have no seed in common, so their difference has no pairs: train both with seed 1, say"
        )
    if len({len(correct_N) for each in (ours, theirs) for correct_N in each.values()}) > 1:
        raise UserError("the runs were evaluated on other numbers of images, some being left out: evaluate them again")
    differences_SN = np.stack([ours[s].astype(np.float64) - theirs[s] for s in seeds])
    S, N = differences_SN.shape
    rng = np.random.default_rng(0)
    means = np.empty(REPLICATES)
    for replicate in range(REPLICATES):
        of_image_N = differences_SN[rng.integers(S, size=S)].mean(0)
        means[replicate] = of_image_N[rng.integers(N, size=N)].mean()
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Difference(float(differences_SN.mean()), float(low), float(high), S, N)

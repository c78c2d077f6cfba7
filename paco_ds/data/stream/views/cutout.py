"""The erased square (Cutout, DeVries and Taylor 2017)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paco_ds.data.stream.views.view import Pixels


@dataclass(frozen=True)
class Cutout:
    """A black square of `side` pixels, centered anywhere in the view: it may extend over the edge."""

    y: int
    x: int
    side: int

    def __call__(self, view: Pixels) -> Pixels:
        top, left = self.y - self.side // 2, self.x - self.side // 2
        view = view.copy()
        view[max(top, 0) : top + self.side, max(left, 0) : left + self.side] = 0
        return view


def draw_cutout(size: int, side: int, rng: np.random.Generator) -> Cutout:
    """Draw a square centered at a pixel of a view of `size` x `size`."""
    return Cutout(int(rng.integers(size)), int(rng.integers(size)), side)

"""The erased square (Cutout, DeVries and Taylor 2017), and random erasing (Zhong et al. 2020)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from paco_ds.data.stream.views.draws import below, uniform
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


_AREA, _RATIO, _TRIES = (0.02, 1 / 3), 0.3, 10  # of the published code, as torchvision and timm have them


@dataclass(frozen=True)
class Erasing:
    """A rectangle of bytes drawn evenly from `seed`, inside the view."""

    top: int
    left: int
    height: int
    width: int
    seed: int

    def __call__(self, view: Pixels) -> Pixels:
        noise = np.frombuffer(np.random.PCG64(self.seed).random_raw(-(-self._bytes // 8)).tobytes(), np.uint8)
        view = view.copy()
        part = view[self.top : self.top + self.height, self.left : self.left + self.width]
        part[:] = noise[: self._bytes].reshape(part.shape)
        return view

    @property
    def _bytes(self) -> int:
        return 3 * self.height * self.width


def draw_erasing(size: int, rng: np.random.Generator) -> tuple[Erasing, ...]:
    """A rectangle as torchvision's RandomErasing draws it: ten tries to fit into `size` x `size`, else none."""
    for _ in range(_TRIES):
        area = size * size * uniform(*_AREA, rng)
        ratio = math.exp(uniform(math.log(_RATIO), -math.log(_RATIO), rng))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < height < size and 0 < width < size:
            top, left = below(size - height + 1, rng), below(size - width + 1, rng)
            return (Erasing(top, left, height, width, below(2**53, rng)),)
    return ()

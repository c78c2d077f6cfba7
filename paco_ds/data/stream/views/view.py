"""Owns what a view is: parameters drawn from an image's size and a generator, then pixels made with them.

Drawing needs no pixels: both views of an image are drawn first, so that the file is decoded once, and no larger than
the crops need. A view's randomness is a function of (seed, epoch, position in the epoch's plan, view), never of a
worker's state. Normalisation belongs to the model, so that images travel and wait as bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]  # [height, width, 3], RGB


class Operation(Protocol):
    """A change of pixels with all its parameters fixed. It returns another array or its input, unchanged."""

    def __call__(self, view: Pixels, /) -> Pixels: ...


class Sampling(Protocol):
    """How the pixels of a view are taken from an image, its parameters fixed."""

    @property
    def reduction(self) -> int:
        """1, 2, 4 or 8: the image may be decoded at a side of 1 / reduction without loss for the view."""
        ...

    def __call__(self, image: Pixels, /) -> Pixels:
        """The view: uint8 [size, size, 3]. `image` has the drawn size, or that divided by up to `reduction`."""
        ...


@dataclass(frozen=True)
class Drawn:
    """All that was drawn for one view of one image."""

    sampling: Sampling
    operations: tuple[Operation, ...] = ()

    def render(self, image: Pixels) -> Pixels:
        """The view, uint8 [size, size, 3] in one piece; `image` is not changed."""
        view = self.sampling(image)
        for operation in self.operations:
            view = operation(view)
        return np.ascontiguousarray(view)


class View(Protocol):
    """A kind of view with its settings."""

    def draw(self, height: int, width: int, rng: np.random.Generator) -> Drawn:
        """Parameters of a view of an image of this size: no pixels needed."""
        ...

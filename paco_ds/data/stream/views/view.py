"""A view: parameters are drawn from the image's size and a generator, then pixels are rendered with them.

Drawing needs no pixels. Both views of an image are drawn first, so that the file is decoded once, no larger than the
crops need. Random draws are a function of (seed, epoch, position in the epoch, view), never of a worker's state. The
model normalises, so images are transferred as bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]  # [height, width, 3], RGB


class Operation(Protocol):
    """An operation with fixed parameters. It returns a new array, or its input unchanged."""

    def __call__(self, view: Pixels, /) -> Pixels: ...


class Sampling(Protocol):
    """Resampling of a part of an image to the size of a view, with fixed parameters."""

    @property
    def reduction(self) -> int:
        """1, 2, 4 or 8: the image may be decoded at 1 / reduction of its side without loss for the view."""
        ...

    def __call__(self, image: Pixels, /) -> Pixels:
        """The view: uint8 [size, size, 3]. `image` has the drawn size, or that divided by up to `reduction`."""
        ...


@dataclass(frozen=True)
class Drawn:
    """The drawn parameters of one view of one image."""

    sampling: Sampling
    operations: tuple[Operation, ...] = ()

    def render(self, image: Pixels) -> Pixels:
        """The view, uint8 [size, size, 3], contiguous; `image` is not changed."""
        view = self.sampling(image)
        for operation in self.operations:
            view = operation(view)
        return np.ascontiguousarray(view)


class View(Protocol):
    """A view with its settings."""

    def draw(self, height: int, width: int, rng: np.random.Generator) -> Drawn:
        """Draw the parameters of a view for an image of this size; no pixels are needed."""
        ...

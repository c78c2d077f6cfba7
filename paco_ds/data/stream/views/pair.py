"""Views of one sample: read the header, draw all views, decode the image once, render the views."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paco_ds.data.shard import RawSample
from paco_ds.data.stream.decode import open_image
from paco_ds.data.stream.views.view import Pixels, View


@dataclass(frozen=True)
class MakeViews:
    """Views of an encoded image, decoded at the scale that the smallest crop needs."""

    views: tuple[View, ...]
    max_pixels: int

    def __call__(self, sample: RawSample, *rngs: np.random.Generator) -> tuple[Pixels, ...]:
        """uint8 [size, size, 3] for each view, drawn by its own generator.

        Raises:
            BadSample: the image cannot be decoded, or has more than `max_pixels`.
        """
        encoded = open_image(sample, self.max_pixels)
        drawn = [view.draw(encoded.height, encoded.width, rng) for view, rng in zip(self.views, rngs, strict=True)]
        image = encoded.decode(min(d.sampling.reduction for d in drawn))
        return tuple(d.render(image) for d in drawn)

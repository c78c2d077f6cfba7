"""Views of one sample: read the header, draw all views, decode the image once, render the views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paco_ds.data.shard import RawSample
from paco_ds.data.stream.decode import open_image
from paco_ds.data.stream.views.view import Drawn, Pixels, View


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
        image, drawn = draw_and_decode(self.views, self.max_pixels, sample, rngs)
        return tuple(d.render(image) for d in drawn)


def draw_and_decode(
    views: Sequence[View],
    max_pixels: int,
    sample: RawSample,
    rngs: Sequence[np.random.Generator],
    *,
    quick: bool = False,
) -> tuple[Pixels, list[Drawn]]:
    """The image, uint8 [H, W, 3], and the parameters of each of its views.

    Args:
        rngs: a generator for each view.
        quick: decode a JPEG's colors less smoothly, see `open_image`.

    Raises:
        BadSample: the image cannot be decoded, or has more than `max_pixels`.
    """
    encoded = open_image(sample, max_pixels, quick=quick)
    drawn = [view.draw(encoded.height, encoded.width, rng) for view, rng in zip(views, rngs, strict=True)]
    return encoded.decode(min(d.sampling.reduction for d in drawn)), drawn

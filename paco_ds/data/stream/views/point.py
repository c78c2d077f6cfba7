"""Operations on single bytes, by a table of 256 values, with PIL's arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from paco_ds.data.stream.views.view import Pixels

_LEVELS = np.arange(256)


@dataclass(frozen=True)
class Invert:
    """255 - value."""

    def __call__(self, view: Pixels) -> Pixels:
        return cv2.bitwise_not(view)


@dataclass(frozen=True)
class Posterize:
    """Keep the upper `bits` of each byte; the others become 0."""

    bits: int

    def __call__(self, view: Pixels) -> Pixels:
        return view & np.uint8(256 - 2 ** (8 - self.bits))


@dataclass(frozen=True)
class Solarize:
    """Invert values of at least `threshold`; 256 inverts none."""

    threshold: float

    def __call__(self, view: Pixels) -> Pixels:
        return cv2.LUT(view, np.where(self.threshold > _LEVELS, _LEVELS, 255 - _LEVELS).astype(np.uint8))


@dataclass(frozen=True)
class SolarizeAdd:
    """Add to values below 128."""

    addend: int

    def __call__(self, view: Pixels) -> Pixels:
        table = np.where(_LEVELS < 128, np.minimum(_LEVELS + self.addend, 255), _LEVELS)
        return cv2.LUT(view, table.astype(np.uint8))


@dataclass(frozen=True)
class AutoContrast:
    """Stretch each channel so that its minimum becomes 0 and its maximum 255."""

    def __call__(self, view: Pixels) -> Pixels:
        table = np.empty((1, 256, 3), np.uint8)
        for channel, plane in enumerate(cv2.split(view)):
            low, high, *_ = cv2.minMaxLoc(plane)
            scale = 255 / (high - low) if high > low else 1.0
            table[0, :, channel] = (_LEVELS * scale - (low * scale if high > low else 0)).clip(0, 255)
        return cv2.LUT(view, table)


@dataclass(frozen=True)
class Equalize:
    """Equalize the histogram of each channel."""

    def __call__(self, view: Pixels) -> Pixels:
        table = np.empty((1, 256, 3), np.uint8)
        for channel in range(3):
            counts = cv2.calcHist([view], [channel], None, [256], [0, 256]).ravel().astype(np.int64)
            step = (view.shape[0] * view.shape[1] - counts[counts.nonzero()[0][-1]]) // 255
            below = np.cumsum(counts) - counts
            table[0, :, channel] = ((step // 2 + below) // step).clip(0, 255) if step else _LEVELS
        return cv2.LUT(view, table)

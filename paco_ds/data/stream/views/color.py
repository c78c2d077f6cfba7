"""Color operations: brightness, contrast, saturation, hue and gray, with PIL's arithmetic on bytes.

As in PIL, blends are computed in float and truncated: five operations that round would brighten images by two bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from paco_ds.data.stream.views.draws import below, uniform
from paco_ds.data.stream.views.view import Operation, Pixels

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R 601, as PIL's gray
_SAME = np.eye(3)
_CUT = -0.499  # OpenCV rounds; this offset makes it truncate and keeps integers


@dataclass(frozen=True)
class Brightness:
    """Multiply by `factor`: a blend with black."""

    factor: float

    def __call__(self, view: Pixels) -> Pixels:
        return _scaled(view, self.factor, 0)


@dataclass(frozen=True)
class Contrast:
    """Scale the difference to the mean gray of the view by `factor`."""

    factor: float

    def __call__(self, view: Pixels) -> Pixels:
        mean = int(np.dot(cv2.mean(view)[:3], LUMA) + 0.5)
        return _scaled(view, self.factor, mean * (1 - self.factor))


@dataclass(frozen=True)
class Saturation:
    """Scale the difference of every pixel to its gray by `factor` (PIL's Color)."""

    factor: float

    def __call__(self, view: Pixels) -> Pixels:
        matrix = np.empty((3, 4))
        matrix[:, :3] = (1 - self.factor) * LUMA + self.factor * _SAME
        matrix[:, 3] = _CUT
        return cv2.transform(view, matrix)


@dataclass(frozen=True)
class Hue:
    """Shift the hue by `shift` of the color circle."""

    shift: float

    def __call__(self, view: Pixels) -> Pixels:
        hsv = cv2.cvtColor(view, cv2.COLOR_RGB2HSV_FULL)
        hsv[..., 0] += np.uint8(int(self.shift * 255) % 256)  # wraps around
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


@dataclass(frozen=True)
class Gray:
    """Three equal channels."""

    def __call__(self, view: Pixels) -> Pixels:
        return cv2.cvtColor(gray(view), cv2.COLOR_GRAY2RGB)


def gray(view: Pixels) -> Pixels:
    """Luma by ITU-R 601, uint8 [height, width]."""
    return cv2.cvtColor(view, cv2.COLOR_RGB2GRAY)


def blended(one: Pixels, other: Pixels, factor: float) -> Pixels:
    """one + factor (other - one), as PIL's blend: 0 is one, 1 the other, above 1 beyond it."""
    return cv2.addWeighted(other, factor, one, 1 - factor, _CUT)


def _scaled(view: Pixels, factor: float, offset: float) -> Pixels:
    return cv2.addWeighted(view, factor, view, 0, offset + _CUT)


def draw_jitter(strength: float, hue: float, rng: np.random.Generator) -> tuple[Operation, ...]:
    """torchvision's ColorJitter(strength, strength, strength, hue): factors uniform, operations in any order."""
    operations: list[Operation] = []
    if strength:
        operations = [kind(uniform(1 - strength, 1 + strength, rng)) for kind in (Brightness, Contrast, Saturation)]
    if hue:
        operations.append(Hue(uniform(-hue, hue, rng)))
    for i in range(len(operations) - 1, 0, -1):  # Fisher and Yates
        j = below(i + 1, rng)
        operations[i], operations[j] = operations[j], operations[i]
    return tuple(operations)

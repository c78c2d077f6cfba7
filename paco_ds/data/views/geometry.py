"""Owns the operations that move pixels: flip, shear, translation, rotation; what comes from outside has one color."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import cv2
import numpy as np

from paco_ds.data.views.view import Pixels

Color = tuple[int, int, int]


class Interpolation(Enum):
    """How a pixel is made from those around its origin."""

    NEAREST = cv2.INTER_NEAREST
    BILINEAR = cv2.INTER_LINEAR
    BICUBIC = cv2.INTER_CUBIC


@dataclass(frozen=True)
class Flip:
    """Left becomes right."""

    def __call__(self, view: Pixels) -> Pixels:
        return cv2.flip(view, 1)


@dataclass(frozen=True)
class ShearX:
    """Rows move by `factor` times their height in the view."""

    factor: float
    interpolation: Interpolation
    fill: Color

    def __call__(self, view: Pixels) -> Pixels:
        return _moved(view, ((1, self.factor, 0), (0, 1, 0)), self.interpolation, self.fill)


@dataclass(frozen=True)
class ShearY:
    """Columns move by `factor` times their place in the view."""

    factor: float
    interpolation: Interpolation
    fill: Color

    def __call__(self, view: Pixels) -> Pixels:
        return _moved(view, ((1, 0, 0), (self.factor, 1, 0)), self.interpolation, self.fill)


@dataclass(frozen=True)
class TranslateX:
    """To the left by `share` of the width."""

    share: float
    interpolation: Interpolation
    fill: Color

    def __call__(self, view: Pixels) -> Pixels:
        return _moved(view, ((1, 0, self.share * view.shape[1]), (0, 1, 0)), self.interpolation, self.fill)


@dataclass(frozen=True)
class TranslateY:
    """Up by `share` of the height."""

    share: float
    interpolation: Interpolation
    fill: Color

    def __call__(self, view: Pixels) -> Pixels:
        return _moved(view, ((1, 0, 0), (0, 1, self.share * view.shape[0])), self.interpolation, self.fill)


@dataclass(frozen=True)
class Rotate:
    """Counter-clockwise about the center, by degrees."""

    degrees: float
    interpolation: Interpolation
    fill: Color

    def __call__(self, view: Pixels) -> Pixels:
        cos, sin = math.cos(math.radians(self.degrees)), math.sin(math.radians(self.degrees))
        x, y = view.shape[1] / 2, view.shape[0] / 2
        rows = ((cos, -sin, x - cos * x + sin * y), (sin, cos, y - sin * x - cos * y))
        return _moved(view, rows, self.interpolation, self.fill)


def _moved(view: Pixels, rows: tuple[tuple[float, ...], ...], interpolation: Interpolation, fill: Color) -> Pixels:
    """Pixel (x, y) comes from rows @ (x, y, 1), both in PIL's coordinates, where pixel centers are at halves."""
    matrix = np.array(rows, np.float64)
    matrix[:, 2] += matrix[:, :2] @ (0.5, 0.5) - 0.5  # OpenCV's are at whole numbers
    return cv2.warpAffine(
        view,
        matrix,
        (view.shape[1], view.shape[0]),
        flags=interpolation.value | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=fill,
    )

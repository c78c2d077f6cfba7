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
        return _translated(view, 1, self.share * view.shape[1], self.interpolation, self.fill)


@dataclass(frozen=True)
class TranslateY:
    """Up by `share` of the height."""

    share: float
    interpolation: Interpolation
    fill: Color

    def __call__(self, view: Pixels) -> Pixels:
        return _translated(view, 0, self.share * view.shape[0], self.interpolation, self.fill)


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


def _translated(view: Pixels, axis: int, pixels: float, interpolation: Interpolation, fill: Color) -> Pixels:
    """Pixel i along `axis` comes from i + pixels: the same mix of neighbours for all, a tenth of `_moved`'s work."""
    whole = math.floor(pixels)
    before, weights = _weights(pixels - whole, interpolation)
    kernel = np.array([weights]) if axis == 1 else np.array([weights]).T
    anchor = (before, 0) if axis == 1 else (0, before)
    mixed = cv2.filter2D(view, -1, kernel, anchor=anchor, borderType=cv2.BORDER_REPLICATE)
    moved = np.full_like(view, fill)
    side = view.shape[axis]
    start, end = max(-whole, 0), min(side - whole, side)  # of what the view still has; a shift may leave nothing
    if start < end:
        to, origin = slice(start, end), slice(start + whole, end + whole)
        moved[(slice(None), to) if axis == 1 else to] = mixed[(slice(None), origin) if axis == 1 else origin]
    return moved


def _weights(share: float, interpolation: Interpolation) -> tuple[int, tuple[float, ...]]:
    """Of a point `share` of the way from a pixel to the next: how many pixels before that one count, and weights."""
    if interpolation is Interpolation.NEAREST:
        return 0, (1.0, 0.0) if share < 0.5 else (0.0, 1.0)
    if interpolation is Interpolation.BILINEAR:
        return 0, (1 - share, share)
    # Keys' cubic with a = -0.5, as PIL's
    inner = [1.5 * d**3 - 2.5 * d**2 + 1 for d in (share, 1 - share)]
    outer = [-0.5 * d**3 + 2.5 * d**2 - 4 * d + 2 for d in (1 + share, 2 - share)]
    return 1, (outer[0], inner[0], inner[1], outer[1])

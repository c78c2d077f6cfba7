"""Geometric operations: flip, shear, translation, rotation. Pixels from outside get one fill color."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import cv2
import numpy as np
import numpy.typing as npt

from paco_ds.data.stream.views.view import Pixels

Color = tuple[int, int, int]
Rows = tuple[tuple[float, float, float], tuple[float, float, float]]


class Interpolation(Enum):
    """Interpolation between the pixels around a source position."""

    NEAREST = cv2.INTER_NEAREST
    BILINEAR = cv2.INTER_LINEAR
    BICUBIC = cv2.INTER_CUBIC


@dataclass(frozen=True)
class Flip:
    """Mirror left and right."""

    def __call__(self, view: Pixels) -> Pixels:
        return cv2.flip(view, 1)


@dataclass(frozen=True)
class ShearX:
    """Shift each row by `factor` times its y coordinate."""

    factor: float
    interpolation: Interpolation
    fill: Color

    def __call__(self, view: Pixels) -> Pixels:
        return _moved(view, self.rows(*view.shape[:2]), self.interpolation, self.fill)

    def rows(self, height: int, width: int) -> Rows:
        """The affine transform of a view of this size."""
        return (1, self.factor, 0), (0, 1, 0)


@dataclass(frozen=True)
class ShearY:
    """Shift each column by `factor` times its x coordinate."""

    factor: float
    interpolation: Interpolation
    fill: Color

    def __call__(self, view: Pixels) -> Pixels:
        return _moved(view, self.rows(*view.shape[:2]), self.interpolation, self.fill)

    def rows(self, height: int, width: int) -> Rows:
        """The affine transform of a view of this size."""
        return (1, 0, 0), (self.factor, 1, 0)


@dataclass(frozen=True)
class TranslateX:
    """Shift to the left by `share` of the width."""

    share: float
    interpolation: Interpolation
    fill: Color

    def __call__(self, view: Pixels) -> Pixels:
        return _translated(view, 1, self.share * view.shape[1], self.interpolation, self.fill)

    def rows(self, height: int, width: int) -> Rows:
        """The affine transform of a view of this size."""
        return (1, 0, self.share * width), (0, 1, 0)


@dataclass(frozen=True)
class TranslateY:
    """Shift up by `share` of the height."""

    share: float
    interpolation: Interpolation
    fill: Color

    def __call__(self, view: Pixels) -> Pixels:
        return _translated(view, 0, self.share * view.shape[0], self.interpolation, self.fill)

    def rows(self, height: int, width: int) -> Rows:
        """The affine transform of a view of this size."""
        return (1, 0, 0), (0, 1, self.share * height)


@dataclass(frozen=True)
class Rotate:
    """Rotate counter-clockwise about the center, in degrees."""

    degrees: float
    interpolation: Interpolation
    fill: Color

    def __call__(self, view: Pixels) -> Pixels:
        return _moved(view, self.rows(*view.shape[:2]), self.interpolation, self.fill)

    def rows(self, height: int, width: int) -> Rows:
        """The affine transform of a view of this size."""
        cos, sin = math.cos(math.radians(self.degrees)), math.sin(math.radians(self.degrees))
        x, y = width / 2, height / 2
        return (cos, -sin, x - cos * x + sin * y), (sin, cos, y - sin * x - cos * y)


Affine = ShearX | ShearY | TranslateX | TranslateY | Rotate
"""Operations that are an affine transform: pixel (x, y) comes from rows @ (x, y, 1), in PIL's coordinates (pixel
centers at halves)."""


def at_pixel_centers(rows: Rows) -> npt.NDArray[np.float64]:
    """An affine transform, float64 [2, 3], in OpenCV's coordinates: pixel centers at integers."""
    matrix = np.array(rows, np.float64)
    matrix[:, 2] += matrix[:, :2] @ (0.5, 0.5) - 0.5
    return matrix


def _moved(view: Pixels, rows: Rows, interpolation: Interpolation, fill: Color) -> Pixels:
    return cv2.warpAffine(
        view,
        at_pixel_centers(rows),
        (view.shape[1], view.shape[0]),
        flags=interpolation.value | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=fill,
    )


def _translated(view: Pixels, axis: int, pixels: float, interpolation: Interpolation, fill: Color) -> Pixels:
    """Pixel i along `axis` comes from i + pixels. One kernel for all pixels: less work than `_moved`."""
    floor, nearest = math.floor(pixels), math.floor(pixels + 0.5)
    first, weights = _weights(pixels - floor, interpolation)
    kernel, anchor = np.array([weights]), (nearest - floor - first, 0)
    if axis == 0:
        kernel, anchor = kernel.T, (0, anchor[0])
    mixed = cv2.filter2D(view, -1, kernel, anchor=anchor, borderType=cv2.BORDER_REPLICATE)
    side = view.shape[axis]
    start, end = max(nearest, 0), min(side + nearest, side)  # of the part that stays in view
    if start >= end:
        return np.full_like(view, fill)
    before, after = start - nearest, side + nearest - end
    if axis == 0:
        return cv2.copyMakeBorder(mixed[start:end], before, after, 0, 0, cv2.BORDER_CONSTANT, value=fill)
    return cv2.copyMakeBorder(mixed[:, start:end], 0, 0, before, after, cv2.BORDER_CONSTANT, value=fill)


def _weights(share: float, interpolation: Interpolation) -> tuple[int, tuple[float, ...]]:
    """For a point `share` of the way from pixel 0 to 1: the first pixel with a weight, and the weights from it on."""
    if interpolation is Interpolation.NEAREST:
        return 0, (1.0, 0.0) if share < 0.5 else (0.0, 1.0)
    if interpolation is Interpolation.BILINEAR:
        return 0, (1 - share, share)
    d = share  # Keys' cubic with a = -1, PIL's for transformations
    return -1, (-d + 2 * d**2 - d**3, 1 - 2 * d**2 + d**3, d + d**2 - d**3, d**3 - d**2)

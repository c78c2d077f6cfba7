"""Crops: where a view lies in its image, and the resampling of that part to the view's size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import cv2
import numpy as np
import torch
from torch.nn import functional

from paco_ds.data.stream.views.draws import below, uniform
from paco_ds.data.stream.views.view import Pixels

Resampling = Literal["bilinear", "bicubic"]


class Axis(NamedTuple):
    """Where the rows, or the columns, of a view lie in the part of an image that they are sampled from.

    Attributes:
        first, step: row i is centered at first + i * step, in pixels of the part, whose own centers are integers.
        support: reach of the triangle filter in pixels of the part; 0 for Keys' cubic, which takes black from outside.
    """

    first: float
    step: float
    support: float

    def shrunk(self, by: int) -> Axis:
        """The same, in a part averaged over `by` x `by` pixels."""
        return Axis((self.first + 0.5) / by - 0.5, self.step / by, max(self.support / by, 1))


class Patch(NamedTuple):
    """A part of an image, uint8 [H, W, 3], and how a view is sampled from it."""

    pixels: Pixels
    rows: Axis
    columns: Axis


REDUCTIONS = (8, 4, 2)  # of a side: a JPEG decoder can scale by these while decoding, which saves time
_LONGEST = 16  # largest aspect ratio in evaluation; a strip of 1 x 50,000 would become 256 x 12.8 million pixels


@dataclass(frozen=True)
class Box:
    """A part of an image of `image_height` x `image_width` pixels that becomes a view of `size` x `size`."""

    top: int
    left: int
    height: int
    width: int
    image_height: int
    image_width: int
    size: int

    @property
    def reduction(self) -> int:
        """The largest reduction at which the box still has at least the view's pixels."""
        return next((r for r in REDUCTIONS if min(self.height, self.width) >= r * self.size), 1)

    def __call__(self, image: Pixels) -> Pixels:
        """Crop and resample. In a reduced image the box is rounded to whole pixels, which moves an edge by at most half
        a pixel of the view."""
        return resampled(self._pixels(image), self.size, self.size)

    def patch(self, image: Pixels) -> Patch:
        """What the view is sampled from, elsewhere."""
        pixels = self._pixels(image)
        rows, columns = pixels.shape[:2]
        return Patch(pixels, _resized(rows, self.size), _resized(columns, self.size))

    def _pixels(self, image: Pixels) -> Pixels:
        rows, columns = image.shape[:2]
        top, bottom = _scaled(self.top, self.height, rows, self.image_height)
        left, right = _scaled(self.left, self.width, columns, self.image_width)
        return image[top:bottom, left:right]


def _resized(length: int, size: int, start: int = 0) -> Axis:
    """Pixels from `start` on of `length` pixels resized to `size`, antialiased."""
    step = length / size
    return Axis((start + 0.5) * step - 0.5, step, max(step, 1))


def _scaled(start: int, length: int, now: int, drawn: int) -> tuple[int, int]:
    """Start and end of a stretch of a side, scaled from `drawn` to `now` pixels."""
    if now == drawn:
        return start, start + length
    begin = min(round(start * now / drawn), now - 1)
    return begin, min(max(round((start + length) * now / drawn), begin + 1), now)


def resampled(image: Pixels, height: int, width: int, interpolation: Resampling = "bilinear") -> Pixels:
    """Antialiased resize: PIL's BILINEAR or BICUBIC within one byte, in less time.

    Args:
        image: uint8 [H, W, 3], or a part of one; returned unchanged if it has the size already.
    """
    if image.shape[:2] == (height, width):
        return image
    rows, columns = image.shape[:2]
    # contiguous, with all strides of channels_last: otherwise torch converts it, and the result, to planes
    planes = torch.from_numpy(np.ascontiguousarray(image)).as_strided(
        (1, 3, rows, columns), (3 * rows * columns, 1, 3 * columns, 3)
    )
    resized = functional.interpolate(planes, (height, width), mode=interpolation, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def resized_crop(
    height: int,
    width: int,
    size: int,
    area: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> Box:
    """Inception crop as torchvision's RandomResizedCrop draws it: ten tries, then the largest legal center crop."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        pixels = height * width * uniform(*area, rng)
        shape = math.exp(uniform(low, high, rng))
        w, h = round(math.sqrt(pixels * shape)), round(math.sqrt(pixels / shape))
        if 0 < w <= width and 0 < h <= height:
            top, left = below(height - h + 1, rng), below(width - w + 1, rng)
            return Box(top, left, h, w, height, width, size)
    h, w = height, width
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    return Box((height - h) // 2, (width - w) // 2, h, w, height, width, size)


@dataclass(frozen=True)
class PaddedCrop:
    """Resize the shorter side to `size`, pad with black, then crop `size` x `size` pixels from (top, left)."""

    resized_height: int
    resized_width: int
    top: int
    left: int
    size: int
    padding: int
    reduction: int = 1

    def __call__(self, image: Pixels) -> Pixels:
        image = resampled(image, self.resized_height, self.resized_width)
        view = np.zeros((self.size, self.size, 3), np.uint8)
        top, left = self.top - self.padding, self.left - self.padding  # in the image without padding
        part = image[max(top, 0) : top + self.size, max(left, 0) : left + self.size]
        down, across = max(-top, 0), max(-left, 0)
        view[down : down + part.shape[0], across : across + part.shape[1]] = part
        return view

    def patch(self, image: Pixels) -> Patch:
        """What the view is sampled from, elsewhere; rows and columns centered outside of it are black."""
        height, width = image.shape[:2]
        rows = _resized(height, self.resized_height, self.top - self.padding)
        return Patch(image, rows, _resized(width, self.resized_width, self.left - self.padding))


def padded_crop(height: int, width: int, size: int, padding: int, rng: np.random.Generator) -> PaddedCrop:
    """torchvision's RandomCrop(size, padding) of the image with its shorter side resized to `size`."""
    short = min(height, width)
    rows, columns = (max(size, round(side * size / short)) for side in (height, width))
    top, left = below(rows + 2 * padding - size + 1, rng), below(columns + 2 * padding - size + 1, rng)
    return PaddedCrop(rows, columns, top, left, size, padding)


@dataclass(frozen=True)
class CenterCrop:
    """Resize the shorter side to `resize`, then crop the center `size` x `size` pixels: torchvision's Resize and
    CenterCrop within one byte, unless one side is more than 16 times the other."""

    resize: int
    size: int
    interpolation: Resampling = "bilinear"
    reduction: int = 1

    def __call__(self, image: Pixels) -> Pixels:
        return _center(resized(image, self.resize, self.interpolation), self.size, self.size)


@dataclass(frozen=True)
class FiveCrops:
    """As `CenterCrop`, of the four corners and the center, as torchvision's FiveCrop orders them, below one another:
    uint8 [5 size, size, 3]."""

    resize: int
    size: int
    interpolation: Resampling = "bilinear"
    reduction: int = 1

    def __call__(self, image: Pixels) -> Pixels:
        image, side = resized(image, self.resize, self.interpolation), self.size
        rows, columns = slice(None, side), slice(None, side)
        lower, right = slice(image.shape[0] - side, None), slice(image.shape[1] - side, None)
        corners = [image[y, x] for y in (rows, lower) for x in (columns, right)]
        return np.concatenate([*corners, _center(image, side, side)])


def resized(image: Pixels, shorter: int, interpolation: Resampling) -> Pixels:
    """The image with a shorter side of so many pixels; of one that is more than 16 times as long as wide the center."""
    short = min(image.shape[:2])
    image = _center(image, _LONGEST * short, _LONGEST * short)
    height, width = (shorter * side // short for side in image.shape[:2])
    return resampled(image, height, width, interpolation)


def _center(image: Pixels, height: int, width: int) -> Pixels:
    """The center of an image, at most height x width."""
    top, left = (round(max(side, 0) / 2) for side in (image.shape[0] - height, image.shape[1] - width))
    return image[top : top + height, left : left + width]


@dataclass(frozen=True)
class ScaledAndShifted:
    """Scale the image about its center and shift it by whole pixels; the background is black."""

    scale: float
    down: int
    right: int
    size: int
    reduction: int = 1

    def __call__(self, image: Pixels) -> Pixels:
        x, y = self._offset(image.shape[1], self.right), self._offset(image.shape[0], self.down)
        matrix = np.array([[self.scale, 0, x], [0, self.scale, y]])
        # linear resampling blurs small images, unlike evaluation's (docs/results/history.md; one seed, within noise)
        return cv2.warpAffine(image, matrix, (self.size, self.size), flags=cv2.INTER_CUBIC)

    def patch(self, image: Pixels) -> Patch:
        """What the view is sampled from, elsewhere."""
        height, width = image.shape[:2]
        return Patch(image, self._axis(height, self.down), self._axis(width, self.right))

    def _offset(self, side: int, shift: int) -> float:
        """Where the image's first pixel comes to lie in the view."""
        return (self.size - 1) / 2 + shift - self.scale * (side - 1) / 2

    def _axis(self, side: int, shift: int) -> Axis:
        return Axis(-self._offset(side, shift) / self.scale, 1 / self.scale, 0)

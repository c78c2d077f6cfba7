"""Operations as rows of numbers, which can be sent to a device and carried out there for many images at once.

Tables of bytes are made here by the operations themselves, from the 256 values a byte has. Factors become integers, in
65536ths: on bytes, integer arithmetic gives the same result on every device, for any number of images.
"""

from __future__ import annotations

import math
from enum import IntEnum
from functools import singledispatch
from typing import NamedTuple

import cv2
import numpy as np

from paco_ds.data.stream.views.blur import REACH, Blur, Sharpness
from paco_ds.data.stream.views.color import LUMA, Brightness, Contrast, Gray, Hue, Saturation
from paco_ds.data.stream.views.cutout import Cutout
from paco_ds.data.stream.views.geometry import (
    Affine,
    Flip,
    Interpolation,
    Rotate,
    ShearX,
    ShearY,
    TranslateX,
    TranslateY,
    at_pixel_centers,
)
from paco_ds.data.stream.views.point import AutoContrast, Equalize, Invert, Posterize, Solarize, SolarizeAdd
from paco_ds.data.stream.views.view import Operation, Pixels
from paco_ds.errors import RecipeError

ONE = 2**16
"""1 as a factor of integer arithmetic."""
BLUR_ONE = 2**8
"""1 as the sum of a blur's weights: two passes over bytes stay below 2^24, so float32 is exact."""

_HALF = ONE // 2
_KEEP = ONE // 1000  # PIL truncates; this keeps what is an integer but for its factor's rounding
_BYTES = np.arange(258).clip(0, 255).astype(np.uint8).reshape(1, 86, 3)  # all values, as a view of 86 pixels
_RED, _GREEN, _BLUE = LUMA.tolist()


class Kind(IntEnum):
    """What is done on a device by one function."""

    NOTHING = 0
    FLIP = 1
    TABLE = 2
    MATRIX = 3
    CUTOUT = 4
    NEAREST = 5
    BILINEAR = 6
    BICUBIC = 7
    SHARPNESS = 8
    HUE = 9
    BLUR = 10
    AUTO_CONTRAST = 11
    EQUALIZE = 12


_BY_INTERPOLATION = {
    Interpolation.NEAREST: Kind.NEAREST,
    Interpolation.BILINEAR: Kind.BILINEAR,
    Interpolation.BICUBIC: Kind.BICUBIC,
}


class Instruction(NamedTuple):
    """An operation on one view: its kind and numbers, which float32 holds exactly where they are integers.

    `table` uint8 [256] is what becomes of each byte, for TABLE.
    """

    kind: Kind
    numbers: tuple[float, ...] = ()
    table: Pixels | None = None


@singledispatch
def instruction(operation: Operation, size: int) -> Instruction:
    """The operation on a view of `size` x `size` pixels.

    Raises:
        RecipeError: it has no form for a device.
    """
    raise RecipeError(
        f"views.device: accelerator has no {type(operation).__name__}, which a view of this recipe draws; "
        f"set views.device to cpu"
    )


@instruction.register
def _flip(operation: Flip, size: int) -> Instruction:
    return Instruction(Kind.FLIP)


@instruction.register
def _brightness(operation: Brightness, size: int) -> Instruction:
    return _scaled(round(operation.factor * ONE), 0)


def _scaled(factor: int, share: int) -> Instruction:
    """All channels by a factor, and so much of the mean gray."""
    return Instruction(Kind.MATRIX, (factor, 0, 0, 0, factor, 0, 0, 0, factor, _KEEP, share))


@instruction.register(Invert)
@instruction.register(Posterize)
@instruction.register(Solarize)
@instruction.register(SolarizeAdd)
def _table(operation: Operation, size: int) -> Instruction:
    return Instruction(Kind.TABLE, table=operation(_BYTES).ravel()[:256])


@instruction.register
def _contrast(operation: Contrast, size: int) -> Instruction:
    factor = round(operation.factor * ONE)
    return _scaled(factor, ONE - factor)


@instruction.register
def _auto_contrast(operation: AutoContrast, size: int) -> Instruction:
    return Instruction(Kind.AUTO_CONTRAST)


@instruction.register
def _equalize(operation: Equalize, size: int) -> Instruction:
    return Instruction(Kind.EQUALIZE)


@instruction.register
def _saturation(operation: Saturation, size: int) -> Instruction:
    return _toward_gray(operation.factor, _KEEP)


@instruction.register
def _gray(operation: Gray, size: int) -> Instruction:
    return _toward_gray(0, _HALF)


def _toward_gray(factor: float, offset: int) -> Instruction:
    """A 3 x 4 matrix; each row of factors adds up to 1, so that gray stays as it is."""
    red, green, blue = ((1 - factor) * weight * ONE for weight in (_RED, _GREEN, _BLUE))
    r, g, b = round(red), round(green), round(blue)
    rows = (ONE - g - b, g, b, r, ONE - r - b, b, r, g, ONE - r - g)
    return Instruction(Kind.MATRIX, (*rows, offset, 0))


@instruction.register
def _hue(operation: Hue, size: int) -> Instruction:
    return Instruction(Kind.HUE, (int(operation.shift * 255) % 256,))


@instruction.register
def _blur(operation: Blur, size: int) -> Instruction:
    """Weights from the center outwards."""
    reach = math.ceil(REACH * operation.sigma)
    weights = np.rint(cv2.getGaussianKernel(2 * reach + 1, operation.sigma)[reach:, 0] * BLUR_ONE)
    weights[0] = BLUR_ONE - 2 * weights[1:].sum()
    return Instruction(Kind.BLUR, tuple(weights.tolist()))


@instruction.register
def _sharpness(operation: Sharpness, size: int) -> Instruction:
    return Instruction(Kind.SHARPNESS, (round(operation.factor * ONE),))


@instruction.register(ShearX)
@instruction.register(ShearY)
@instruction.register(TranslateX)
@instruction.register(TranslateY)
@instruction.register(Rotate)
def _affine(operation: Affine, size: int) -> Instruction:
    """A 2 x 3 matrix in units of half a view, whose edges are -1 and 1."""
    of_x, of_y, offset = at_pixel_centers(operation.rows(size, size)).T
    unit = np.stack([of_x, of_y, ((of_x + of_y) * (size - 1) + 2 * offset + 1) / size - 1], 1)
    return Instruction(_BY_INTERPOLATION[operation.interpolation], (*unit.ravel().tolist(), *operation.fill))


@instruction.register
def _cutout(operation: Cutout, size: int) -> Instruction:
    top, left = operation.y - operation.side // 2, operation.x - operation.side // 2
    return Instruction(Kind.CUTOUT, (top, top + operation.side, left, left + operation.side))

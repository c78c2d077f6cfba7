"""AutoAugment's CIFAR-10 policy (Cubuk et al. 2019, table 7) with the ranges of the published PaCo code.

That code differs from torchvision's in three points, kept here: pixels from outside are gray, rotations are always
counter-clockwise, and shears are bicubic while translations and rotations take the nearest pixel.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from paco_ds.data.stream.views.blur import Sharpness
from paco_ds.data.stream.views.color import Brightness, Contrast, Saturation
from paco_ds.data.stream.views.draws import below, happens
from paco_ds.data.stream.views.geometry import Color, Interpolation, Rotate, ShearY, TranslateX, TranslateY
from paco_ds.data.stream.views.point import AutoContrast, Equalize, Invert, Posterize, Solarize
from paco_ds.data.stream.views.view import Operation

_Make = Callable[[float, float, Color], Operation]

# level: the magnitude of the policy, 0 to 9, as a share of 9; sign: -1 or 1
_OPERATIONS: dict[str, _Make] = {
    "invert": lambda level, sign, fill: Invert(),
    "autocontrast": lambda level, sign, fill: AutoContrast(),
    "equalize": lambda level, sign, fill: Equalize(),
    "posterize": lambda level, sign, fill: Posterize(round(8 - 4 * level)),
    "solarize": lambda level, sign, fill: Solarize(256 * (1 - level)),
    "color": lambda level, sign, fill: Saturation(1 + sign * 0.9 * level),
    "contrast": lambda level, sign, fill: Contrast(1 + sign * 0.9 * level),
    "brightness": lambda level, sign, fill: Brightness(1 + sign * 0.9 * level),
    "sharpness": lambda level, sign, fill: Sharpness(1 + sign * 0.9 * level),
    "rotate": lambda level, sign, fill: Rotate(30 * level, Interpolation.NEAREST, fill),
    "shear_y": lambda level, sign, fill: ShearY(sign * 0.3 * level, Interpolation.BICUBIC, fill),
    "translate_x": lambda level, sign, fill: TranslateX(sign * 150 / 331 * level, Interpolation.NEAREST, fill),
    "translate_y": lambda level, sign, fill: TranslateY(sign * 150 / 331 * level, Interpolation.NEAREST, fill),
}

_Step = tuple[str, float, int]  # operation, probability, magnitude

CIFAR10_POLICY: tuple[tuple[_Step, _Step], ...] = (
    (("invert", 0.1, 7), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, 8), ("equalize", 0.9, 2)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 5), ("equalize", 0.5, 1)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 7), ("autocontrast", 0.4, 8)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 3)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 8), ("equalize", 0.6, 4)),
    (("color", 0.9, 9), ("equalize", 0.6, 6)),
    (("autocontrast", 0.8, 4), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 3)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, 2), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 8), ("invert", 0.1, 3)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, 1)),
)


def draw_cifar10_policy(fill: Color, rng: np.random.Generator) -> tuple[Operation, ...]:
    """Draw one of the 25 pairs; each operation is applied with its probability."""
    drawn: list[Operation] = []
    for name, probability, magnitude in CIFAR10_POLICY[below(len(CIFAR10_POLICY), rng)]:
        if happens(probability, rng):
            sign = 1 if happens(0.5, rng) else -1
            drawn.append(operation_of(name, magnitude, sign, fill))
    return tuple(drawn)


def operation_of(name: str, magnitude: int, sign: int, fill: Color) -> Operation:
    """An operation of the policy at a magnitude of 0 to 9; `sign` -1 or 1 is its direction where it has one."""
    return _OPERATIONS[name](magnitude / 9, sign, fill)

"""RandAugment (Cubuk et al. 2020) of timm, as in the published runs: `rand-n2-m10-mstd0.5`.

It differs from torchvision's: 15 operations; each drawn operation is applied with probability .5; its magnitude is
normal and at most 10; brightness, contrast, color and sharpness rise with it from .1 to 1.9; posterize and solarize
weaken.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from paco_ds.config.views import RandAugmentSettings
from paco_ds.data.stream.views.blur import Sharpness
from paco_ds.data.stream.views.color import Brightness, Contrast, Saturation
from paco_ds.data.stream.views.draws import below, happens
from paco_ds.data.stream.views.geometry import Interpolation, Rotate, ShearX, ShearY, TranslateX, TranslateY
from paco_ds.data.stream.views.point import AutoContrast, Equalize, Invert, Posterize, Solarize, SolarizeAdd
from paco_ds.data.stream.views.view import Operation

_TOP = 10.0  # the magnitude of full strength
_INTERPOLATIONS = (Interpolation.BILINEAR, Interpolation.BICUBIC)


def draw_randaugment(settings: RandAugmentSettings, rng: np.random.Generator) -> tuple[Operation, ...]:
    """Draw the operations of one view, from none to `settings.operations`."""
    drawn: list[Operation] = []
    for _ in range(settings.operations):
        make = OPERATIONS[below(len(OPERATIONS), rng)]
        if happens(settings.probability, rng):
            magnitude = settings.magnitude + settings.magnitude_std * rng.standard_normal()
            drawn.append(make(min(max(magnitude, 0.0), _TOP) / _TOP, settings, rng))
    return tuple(drawn)


def _signed(value: float, rng: np.random.Generator) -> float:
    return value if happens(0.5, rng) else -value


def _interpolation(rng: np.random.Generator) -> Interpolation:
    return _INTERPOLATIONS[below(2, rng)]


_Make = Callable[[float, RandAugmentSettings, np.random.Generator], Operation]

# level: magnitude / 10, from 0 to 1
OPERATIONS: tuple[_Make, ...] = (
    lambda level, s, rng: AutoContrast(),
    lambda level, s, rng: Equalize(),
    lambda level, s, rng: Invert(),
    lambda level, s, rng: Rotate(_signed(level * 30, rng), _interpolation(rng), s.fill),
    lambda level, s, rng: Posterize(int(level * 4)),
    lambda level, s, rng: Solarize(int(level * 256)),
    lambda level, s, rng: SolarizeAdd(int(level * 110)),
    lambda level, s, rng: Saturation(level * 1.8 + 0.1),
    lambda level, s, rng: Contrast(level * 1.8 + 0.1),
    lambda level, s, rng: Brightness(level * 1.8 + 0.1),
    lambda level, s, rng: Sharpness(level * 1.8 + 0.1),
    lambda level, s, rng: ShearX(_signed(level * 0.3, rng), _interpolation(rng), s.fill),
    lambda level, s, rng: ShearY(_signed(level * 0.3, rng), _interpolation(rng), s.fill),
    lambda level, s, rng: TranslateX(_signed(level * s.translation, rng), _interpolation(rng), s.fill),
    lambda level, s, rng: TranslateY(_signed(level * s.translation, rng), _interpolation(rng), s.fill),
)

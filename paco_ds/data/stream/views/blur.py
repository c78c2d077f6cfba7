"""Operations on neighbouring pixels: Gaussian blur and sharpness."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from paco_ds.data.stream.views.color import blended
from paco_ds.data.stream.views.view import Pixels

_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # PIL's ImageFilter.SMOOTH
REACH = 2.5  # standard deviations; the 1.2 % of weight beyond is spread over the rest


@dataclass(frozen=True)
class Blur:
    """Gaussian blur with `sigma` pixels."""

    sigma: float

    def __call__(self, view: Pixels) -> Pixels:
        side = 2 * math.ceil(REACH * self.sigma) + 1
        kernel = cv2.getGaussianKernel(side, self.sigma)
        return cv2.sepFilter2D(view, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)


@dataclass(frozen=True)
class Sharpness:
    """Scale the difference to the smoothed view by `factor`: 0 smooths, 1 changes nothing, 2 sharpens. Border pixels
    stay."""

    factor: float

    def __call__(self, view: Pixels) -> Pixels:
        smooth = cv2.filter2D(view, -1, _SMOOTH)
        for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
            smooth[edge] = view[edge]
        return blended(smooth, view, self.factor)

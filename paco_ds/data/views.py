"""Views: an image (uint8 [H, W, 3], RGB) and a random generator in, a uint8 [size, size, 3] view out.

A view's randomness is a function of (seed, epoch, position in the epoch's plan, view), never of a worker's state.
Normalisation belongs to the model, so that images travel and wait as bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from paco_ds.recipe import EvalView, RegularView, SmallView

View = Callable[[np.ndarray, np.random.Generator], np.ndarray]

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R 601, as PIL's grey


def make_view(settings: SmallView | RegularView | EvalView) -> View:
    """The function that draws one view with these settings."""
    return _MAKERS[type(settings)](settings)


class _Small:
    def __init__(self, settings: SmallView) -> None:
        self.s = settings

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        s = self.s
        zoom = np.exp(rng.uniform(*np.log(s.zoom)))
        shift = rng.integers(-s.shift, s.shift + 1, 2)  # whole pixels, which need no resampling
        scale = zoom * s.size / min(image.shape[:2])
        view = _scaled_and_shifted(image, s.size, scale, shift)
        if rng.random() < s.flip:
            view = view[:, ::-1].copy()
        if s.cutout:
            _cut_out(view, s.cutout, rng)
        return view


def _scaled_and_shifted(image: np.ndarray, size: int, scale: float, shift: np.ndarray) -> np.ndarray:
    """The image scaled about its center, moved by `shift` pixels, on black."""
    height, width = image.shape[:2]
    # pixel centers lie at half-integers, hence the two halves
    x = (size - 1) / 2 + shift[0] - scale * (width - 1) / 2
    y = (size - 1) / 2 + shift[1] - scale * (height - 1) / 2
    matrix = np.array([[scale, 0, x], [0, scale, y]])
    # linear resampling blurs small images, and evaluation's are sharp (docs/results.md; one seed, within noise)
    return cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_CUBIC)


def _cut_out(view: np.ndarray, side: int, rng: np.random.Generator) -> None:
    """Erase one square whose center is anywhere in the view, so that it may hang over the edge (DeVries 2017)."""
    y, x = rng.integers(view.shape[0]), rng.integers(view.shape[1])
    top, left = max(y - side // 2, 0), max(x - side // 2, 0)
    view[top : y - side // 2 + side, left : x - side // 2 + side] = 0


class _Regular:
    def __init__(self, settings: RegularView) -> None:
        self.s = settings

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        s = self.s
        top, left, height, width = _crop_box(image.shape[0], image.shape[1], s.area, rng)
        crop = image[top : top + height, left : left + width]
        shrinks = min(height, width) >= s.size
        view = cv2.resize(crop, (s.size, s.size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        if rng.random() < s.flip:
            view = view[:, ::-1]
        return _jittered(view, s.jitter, rng) if s.jitter else np.ascontiguousarray(view)


def _crop_box(
    height: int, width: int, area: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Inception crop as torchvision's RandomResizedCrop draws it: ten tries, then the largest legal center crop."""
    ratios = (3 / 4, 4 / 3)
    for _ in range(10):
        pixels = height * width * rng.uniform(*area)
        ratio = np.exp(rng.uniform(*np.log(ratios)))
        w, h = round(np.sqrt(pixels * ratio)), round(np.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h, w = height, width
    if width / height < ratios[0]:
        h = round(width / ratios[0])
    elif width / height > ratios[1]:
        w = round(height * ratios[1])
    return (height - h) // 2, (width - w) // 2, h, w


def _jittered(view: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast and saturation, each by a factor in [1 - strength, 1 + strength], in drawn order."""
    pixels = view.astype(np.float32)
    factors = rng.uniform(1 - strength, 1 + strength, 3).astype(np.float32)
    for operation in rng.permutation(3):
        factor = factors[operation]
        if operation == 0:
            pixels = pixels * factor
        elif operation == 1:
            pixels = pixels * factor + (1 - factor) * float((pixels @ _LUMA).mean())
        else:
            pixels = pixels * factor + (1 - factor) * (pixels @ _LUMA)[..., None]
        pixels = pixels.clip(0, 255)
    return np.rint(pixels).astype(np.uint8)


class _Eval:
    def __init__(self, settings: EvalView) -> None:
        self.s = settings

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        size, short = self.s.size, min(image.shape[:2])
        if short != self.s.resize:
            scale = self.s.resize / short
            height, width = (max(self.s.resize, round(side * scale)) for side in image.shape[:2])
            interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
            image = cv2.resize(image, (width, height), interpolation=interpolation)
        top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
        return np.ascontiguousarray(image[top : top + size, left : left + size])


_MAKERS: dict[type, Callable[..., View]] = {SmallView: _Small, RegularView: _Regular, EvalView: _Eval}

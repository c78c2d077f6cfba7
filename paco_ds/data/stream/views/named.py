"""The views that a recipe can name: which operations they draw, in which order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from paco_ds.config.views import AnyView, ChainView, CifarView, EvalView, SmallView
from paco_ds.data.stream.views.autoaugment import draw_cifar10_policy
from paco_ds.data.stream.views.blur import Blur
from paco_ds.data.stream.views.color import Gray, draw_jitter
from paco_ds.data.stream.views.crop import CenterCrop, FiveCrops, ScaledAndShifted, padded_crop, resized_crop
from paco_ds.data.stream.views.cutout import draw_cutout, draw_erasing
from paco_ds.data.stream.views.draws import happens, uniform
from paco_ds.data.stream.views.geometry import Flip
from paco_ds.data.stream.views.randaugment import draw_randaugment
from paco_ds.data.stream.views.view import Drawn, Operation, View


def make_view(settings: AnyView) -> View:
    """The view with these settings."""
    return next(make(settings) for kind, make in _MAKERS.items() if isinstance(settings, kind))


@dataclass(frozen=True)
class _Chain:
    settings: ChainView

    def draw(self, height: int, width: int, rng: np.random.Generator) -> Drawn:
        s = self.settings
        box = resized_crop(height, width, s.size, s.area, s.ratio, rng)
        flip: tuple[Operation, ...] = (Flip(),) if happens(s.flip, rng) else ()
        jitter = draw_jitter(s.jitter, s.hue, rng) if happens(s.jitter_probability, rng) else ()
        gray: tuple[Operation, ...] = (Gray(),) if happens(s.gray, rng) else ()
        blur: tuple[Operation, ...] = (Blur(uniform(*s.blur_sigma, rng)),) if happens(s.blur, rng) else ()
        augment = draw_randaugment(s.randaugment, rng) if s.randaugment else ()
        colors = gray + jitter if s.gray_first else jitter + gray
        erased = draw_erasing(s.size, rng) if s.erasing and happens(s.erasing, rng) else ()
        return Drawn(box, flip + colors + blur + augment + erased)


@dataclass(frozen=True)
class _Cifar:
    settings: CifarView

    def draw(self, height: int, width: int, rng: np.random.Generator) -> Drawn:
        s = self.settings
        crop = padded_crop(height, width, s.size, s.padding, rng)
        flip: tuple[Operation, ...] = (Flip(),) if happens(s.flip, rng) else ()
        policy = draw_cifar10_policy(s.fill, rng) if s.autoaugment else ()
        cutout: tuple[Operation, ...] = (draw_cutout(s.size, s.cutout, rng),) if s.cutout else ()
        return Drawn(crop, flip + policy + cutout)


@dataclass(frozen=True)
class _Small:
    settings: SmallView

    def draw(self, height: int, width: int, rng: np.random.Generator) -> Drawn:
        s = self.settings
        low, high = np.log(s.zoom).tolist()
        zoom = np.exp(low + (high - low) * rng.random())
        # whole pixels: no resampling
        right, down = int(rng.integers(-s.shift, s.shift + 1)), int(rng.integers(-s.shift, s.shift + 1))
        sampling = ScaledAndShifted(zoom * s.size / min(height, width), down, right, s.size)
        flip: tuple[Operation, ...] = (Flip(),) if happens(s.flip, rng) else ()
        cutout: tuple[Operation, ...] = (draw_cutout(s.size, s.cutout, rng),) if s.cutout else ()
        return Drawn(sampling, flip + cutout)


@dataclass(frozen=True)
class _Eval:
    settings: EvalView

    def draw(self, height: int, width: int, rng: np.random.Generator) -> Drawn:
        s = self.settings
        crop = FiveCrops if s.crops == "five" else CenterCrop
        return Drawn(crop(s.resize, s.size, s.interpolation))


_MAKERS: dict[type, Callable[..., View]] = {ChainView: _Chain, CifarView: _Cifar, SmallView: _Small, EvalView: _Eval}

"""Drawn parameters of every view have the distributions of torchvision's and timm's, at 10,000 draws each.

Two samples are compared by Kolmogorov-Smirnov or chi-square at p > 1e-3, with fixed seeds.
"""

import random
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from timm.data.auto_augment import rand_augment_transform
from torchvision import transforms

from paco_ds.config.views import (
    CifarKeyView,
    CifarView,
    MocoV2View,
    RandAugmentSettings,
    RandClsStackView,
    RandClsView,
    RegularView,
    Sim02View,
    SimView,
)
from paco_ds.data.stream.views import make_view
from paco_ds.data.stream.views.autoaugment import CIFAR10_POLICY, draw_cifar10_policy, operation_of
from paco_ds.data.stream.views.blur import Blur, Sharpness
from paco_ds.data.stream.views.color import Brightness, Contrast, Gray, Hue, Saturation, draw_jitter
from paco_ds.data.stream.views.crop import resized_crop
from paco_ds.data.stream.views.cutout import Cutout
from paco_ds.data.stream.views.geometry import Flip, Interpolation, Rotate, ShearX, ShearY, TranslateX, TranslateY
from paco_ds.data.stream.views.point import AutoContrast, Equalize, Invert, Posterize, Solarize, SolarizeAdd
from paco_ds.data.stream.views.randaugment import draw_randaugment

DRAWS, ALPHA = 10_000, 1e-3
JITTER = (Brightness, Contrast, Saturation, Hue)
# what each of timm's names is here, and which of its fields timm's only argument is
TIMM = {
    "AutoContrast": (AutoContrast, None),
    "Equalize": (Equalize, None),
    "Invert": (Invert, None),
    "Rotate": (Rotate, "degrees"),
    "Posterize": (Posterize, "bits"),
    "Solarize": (Solarize, "threshold"),
    "SolarizeAdd": (SolarizeAdd, "addend"),
    "Color": (Saturation, "factor"),
    "Contrast": (Contrast, "factor"),
    "Brightness": (Brightness, "factor"),
    "Sharpness": (Sharpness, "factor"),
    "ShearX": (ShearX, "factor"),
    "ShearY": (ShearY, "factor"),
    "TranslateXRel": (TranslateX, "share"),
    "TranslateYRel": (TranslateY, "share"),
}


def same_distribution(ours, theirs):
    """Kolmogorov-Smirnov of two samples."""
    assert stats.ks_2samp(ours, theirs).pvalue > ALPHA


def same_counts(ours, theirs):
    """Chi-square of two tallies with the same categories."""
    names = sorted(ours.keys() | theirs.keys())
    table = [[tally[name] for name in names] for tally in (ours, theirs)]
    assert stats.chi2_contingency(table).pvalue > ALPHA


def happens_with(probability, count, of=DRAWS):
    """Binomial test."""
    assert stats.binomtest(count, of, probability).pvalue > ALPHA


@pytest.mark.parametrize(("height", "width"), [(467, 700), (700, 467), (90, 1000)])
@pytest.mark.parametrize("area", [(0.08, 1.0), (0.2, 1.0)])
def test_crops_lie_where_torchvision_lays_them(height, width, area):
    """Corner, sides, area and ratio, fallback to the center crop included."""
    rng, image = np.random.default_rng(0), torch.empty(0, height, width)
    torch.manual_seed(0)
    boxes = [resized_crop(height, width, 224, area, (3 / 4, 4 / 3), rng) for _ in range(DRAWS)]
    ours = np.array([(box.top, box.left, box.height, box.width) for box in boxes])
    theirs = np.array(
        [transforms.RandomResizedCrop.get_params(image, list(area), [3 / 4, 4 / 3]) for _ in range(DRAWS)]
    )
    for sample in (ours, theirs):
        assert (sample[:, 0] + sample[:, 2]).max() <= height
        assert (sample[:, 1] + sample[:, 3]).max() <= width
    for column in range(4):
        same_distribution(ours[:, column], theirs[:, column])
    same_distribution(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])
    same_distribution(ours[:, 3] / ours[:, 2], theirs[:, 3] / theirs[:, 2])


@pytest.mark.parametrize(("strength", "hue"), [(0.4, 0.0), (0.4, 0.1)])
def test_jitter_is_torchvisions(strength, hue):
    """Factors of each operation, and the order of all."""
    rng, orders, factors = np.random.default_rng(1), (Counter(), Counter()), (defaultdict(list), defaultdict(list))
    torch.manual_seed(1)
    ranges = [[1 - strength, 1 + strength]] * 3 + [[-hue, hue] if hue else None]
    for _ in range(DRAWS):
        operations: Any = draw_jitter(strength, hue, rng)
        orders[0][tuple(JITTER.index(type(o)) for o in operations)] += 1
        for o in operations:
            factors[0][JITTER.index(type(o))].append(o.shift if isinstance(o, Hue) else o.factor)
        order, *values = transforms.ColorJitter.get_params(*ranges)
        orders[1][tuple(i for i in order.tolist() if values[i] is not None)] += 1
        for i, value in enumerate(values):
            if value is not None:
                factors[1][i].append(value)
    same_counts(*orders)
    assert factors[0].keys() == factors[1].keys()
    for i, values in factors[0].items():
        same_distribution(values, factors[1][i])


@pytest.mark.parametrize(("count", "magnitude"), [(2, 10), (3, 12), (2, 5)])
def test_randaugment_is_timms(count, magnitude):
    """Which operations, how many, with what arguments and how resampled."""
    rng = np.random.default_rng(2)
    random.seed(2)
    np.random.seed(2)
    settings = RandAugmentSettings(operations=count, magnitude=magnitude)
    recorded = []
    timm = rand_augment_transform(f"rand-n{count}-m{magnitude}-mstd0.5", {"img_mean": settings.fill})
    assert [op.name for op in timm.ops] == list(TIMM)
    for op in timm.ops:
        op.aug_fn = lambda image, *values, name=op.name, **options: recorded.append((name, values, options))
    many, names, values = (Counter(), Counter()), (Counter(), Counter()), (defaultdict(list), defaultdict(list))
    kinds = {kind: (name, field) for name, (kind, field) in TIMM.items()}
    resampled = Counter()
    for _ in range(DRAWS):
        drawn: Any = draw_randaugment(settings, rng)
        many[0][len(drawn)] += 1
        for operation in drawn:
            name, field = kinds[type(operation)]
            names[0][name] += 1
            if field:
                values[0][name].append(getattr(operation, field))
            if hasattr(operation, "interpolation"):
                resampled[operation.interpolation] += 1
                assert operation.fill == settings.fill
        recorded.clear()
        timm("image")
        many[1][len(recorded)] += 1
        for name, arguments, options in recorded:
            names[1][name] += 1
            if arguments:
                values[1][name].append(arguments[0])
            assert options["fillcolor"] == settings.fill
    same_counts(*many)
    same_counts(*names)
    assert values[0].keys() == values[1].keys()
    for name, sample in values[0].items():
        same_distribution(sample, values[1][name])
    assert resampled.keys() == {Interpolation.BILINEAR, Interpolation.BICUBIC}  # timm chooses inside the operation
    happens_with(0.5, resampled[Interpolation.BICUBIC], resampled.total())


@pytest.mark.parametrize(
    ("settings", "gray", "blur", "jitter", "hue", "augment"),
    [
        (RegularView(), 0, 0, 1, False, False),
        (RandClsView(), 0, 0, 1, False, True),
        (RandClsStackView(), 0.2, 0.5, 1, False, True),
        (SimView(), 0.2, 0.5, 1, False, False),
        (Sim02View(), 0.2, 0.5, 1, False, False),
        (MocoV2View(), 0.2, 0.5, 0.8, True, False),
        (RegularView(gray=0.2, gray_first=True), 0.2, 0, 1, False, False),  # MoCo's first version
        (CifarKeyView(), 0.2, 0.5, 0.8, True, False),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_named_view_draws_what_the_published_code_composes(settings, gray, blur, jitter, hue, augment):
    """Probabilities, order, blur's sigma, smallest crop: design of the published augmentations, one by one."""
    assert bool(settings.randaugment) == augment
    rng, view = np.random.default_rng(3), make_view(settings.model_copy(update={"randaugment": None}))
    counts, sigmas, areas = Counter(), [], []
    for _ in range(DRAWS):
        drawn: Any = view.draw(500, 500, rng)
        kinds = [type(o) for o in drawn.operations]
        counts.update(set(kinds))
        sigmas += [o.sigma for o in drawn.operations if isinstance(o, Blur)]
        areas.append(drawn.sampling.height * drawn.sampling.width / 250_000)
        stage = [0 if k == Flip else 2 if k == Blur else 1 for k in kinds]
        assert stage == sorted(stage)
        if Gray in kinds and Brightness in kinds:
            assert (kinds.index(Gray) < kinds.index(Brightness)) == settings.gray_first
    happens_with(0.5, counts[Flip])
    happens_with(gray, counts[Gray])
    happens_with(blur, counts[Blur])
    for kind in JITTER:
        happens_with(jitter if kind is not Hue or hue else 0, counts[kind])
    if blur:
        assert stats.kstest(sigmas, stats.uniform(0.1, 1.9).cdf).pvalue > ALPHA
    low = 0.2 if settings.name in ("sim02", "mocov2", "cifar_key") else 0.08
    assert low * 0.97 < min(areas) < low * 1.1  # sides are rounded


def test_randaugment_comes_last():
    """After jitter, gray and blur, as the published code stacks them."""
    drawn = make_view(RandClsStackView(blur=1, gray=1, flip=1)).draw(500, 500, np.random.default_rng(0))
    assert [type(o) for o in drawn.operations[4:6]] == [Gray, Blur]


def test_the_cifar_policy_is_torchvisions_table():
    """Operations, probabilities and magnitudes of all 25 pairs, and what a magnitude means."""
    reference = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10)
    names = {name.lower().replace("shear", "shear_").replace("translate", "translate_"): name for name in TV_NAMES}
    ours = [
        tuple((names[name], p, m if names[name] not in WITHOUT else None) for name, p, m in couple)
        for couple in CIFAR10_POLICY
    ]
    assert ours == [tuple(couple) for couple in reference.policies]
    space = reference._augmentation_space(10, (331, 331))
    for name, (kind, field, of) in FIELDS.items():
        magnitudes = space[names[name]][0]
        for m in range(10):
            found = operation_of(name, m, 1, (128, 128, 128))
            assert isinstance(found, kind)
            np.testing.assert_allclose(
                getattr(found, field), of(float(magnitudes[m])), rtol=1e-6, atol=1.01 * (name == "solarize")
            )


TV_NAMES = [
    "Invert",
    "AutoContrast",
    "Equalize",
    "Posterize",
    "Solarize",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "Rotate",
    "ShearY",
    "TranslateX",
    "TranslateY",
]
WITHOUT = ("Invert", "AutoContrast", "Equalize")
FIELDS = {
    "posterize": (Posterize, "bits", lambda m: m),
    "solarize": (Solarize, "threshold", lambda m: m),  # up to 255 there, to 256 here as published
    "color": (Saturation, "factor", lambda m: 1 + m),
    "contrast": (Contrast, "factor", lambda m: 1 + m),
    "brightness": (Brightness, "factor", lambda m: 1 + m),
    "sharpness": (Sharpness, "factor", lambda m: 1 + m),
    "rotate": (Rotate, "degrees", lambda m: m),
    "shear_y": (ShearY, "factor", lambda m: m),
    "translate_x": (TranslateX, "share", lambda m: m / 331),
    "translate_y": (TranslateY, "share", lambda m: m / 331),
}


def test_the_cifar_policy_is_drawn_as_published():
    """Pairs uniformly, each operation with its probability, signs evenly; a rotation is never negative."""
    rng = np.random.default_rng(4)
    found, signs = Counter(), Counter()
    for _ in range(DRAWS):
        for operation in draw_cifar10_policy((128, 128, 128), rng):
            found[type(operation)] += 1
            if isinstance(operation, TranslateY | TranslateX | ShearY):
                signs[(getattr(operation, "share", 0) + getattr(operation, "factor", 0)) > 0] += 1
            if isinstance(operation, Rotate):
                assert operation.degrees == pytest.approx(30 * 2 / 9)
    expected: defaultdict[type, float] = defaultdict(float)
    for couple in CIFAR10_POLICY:
        for name, probability, magnitude in couple:
            expected[type(operation_of(name, magnitude, 1, (0, 0, 0)))] += probability / len(CIFAR10_POLICY)
    for kind, probability in expected.items():
        mean, of = found[kind] / DRAWS, probability
        assert abs(mean - of) < 4.5 * np.sqrt(of / DRAWS)
    happens_with(0.5, signs[True], signs.total())


def test_cifar_crops_and_holes_are_anywhere():
    """Offsets 0 to 8 in both directions, centers of the hole at any pixel, flips half of the time."""
    rng, view = np.random.default_rng(5), make_view(CifarView())
    offsets, holes, flips = Counter(), [], 0
    for _ in range(DRAWS):
        drawn: Any = view.draw(32, 32, rng)
        offsets[drawn.sampling.top, drawn.sampling.left] += 1
        holes += [(o.y, o.x) for o in drawn.operations if isinstance(o, Cutout)]
        flips += drawn.operations[0] == Flip()
    assert len(offsets) == 81
    assert stats.chisquare(list(offsets.values())).pvalue > ALPHA
    for axis in zip(*holes, strict=True):
        assert stats.chisquare(list(Counter(axis).values())).pvalue > ALPHA
        assert set(axis) == set(range(32))
    happens_with(0.5, flips)

"""Settings suggested by the class counts of a data set: alpha, queue and batch with reasons; a card and a recipe.

The values are starting points from the published runs and from p_c = 1 / (1 + alpha K_y) (Remark 2 of the paper), with
K_y = q(y) (queue + 2 m - 1) of Eq. 9: where alpha K of the largest class is far above that of the published runs, its
center contributes nothing.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import paco_ds
from paco_ds.data.manifest import Manifest, Split
from paco_ds.data.pack.image_bytes import BadImage, colors_of, size_of
from paco_ds.data.shard import BadSample, ShardReader
from paco_ds.errors import DataError

PUBLISHED_ALPHA = 0.05
ALPHA_K_OF_HEAD = 4.5  # of ImageNet-LT: alpha .05, its largest class has K = 90
_LONGEST_QUEUE = 8192  # of the published runs
_QUEUE_SHARE = 1 / 14  # of an epoch's images: ImageNet-LT's 8192 of 115,846
_LEAST_MICRO_BATCH, _FEWEST_STEPS = 4, 8  # BatchNorm needs some images, an epoch some steps
_SMALL_SIDE = 64  # pixels; larger images are photographs
WEIGHTS = "torchvision:IMAGENET1K_V2"
_FEW_FOR_SCRATCH = 100_000  # images; ImageNet-LT, trained from scratch in the paper, has 115,846
_SMALL_SET = 20_000  # images; below this a batch of 128 leaves few steps in an epoch
_TRAIN = Path(paco_ds.__file__).with_name("train.py")
_SAMPLED = 64  # images sampled for their size and colors


@dataclass(frozen=True)
class Sampled:
    """What a sample of images shows.

    Attributes:
        shorter_side: pixels of the median image's shorter side.
        mean, std: of the pixels of each channel, of 1.
        read: images that these are of.
        unread: images that cannot be used, and why.
    """

    shorter_side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    read: int
    unread: tuple[str, ...] = ()


@dataclass(frozen=True)
class Suggestion:
    """Suggested settings, with reasons.

    Attributes:
        images: what a sample of them shows.
        workers: loader processes of a rank on this host.
        start_from: weights to start from, None for those of a recipe from scratch.
        reasons: a line per setting.
    """

    alpha: float
    temperature: float
    queue: int
    micro_batch: int
    micro_batches: int
    key_momentum: float
    images: Sampled
    workers: int
    start_from: str | None
    reasons: tuple[str, ...]


def suggest(manifest: Manifest, train_split: str = "train") -> Suggestion:
    """Settings for the class counts and image sizes of a split; DataError if it has no images."""
    counts = np.array(manifest.split(train_split).class_counts)
    samples, head = int(counts.sum()), int(counts.max())
    micro_batches = 2 if samples < _SMALL_SET else 4
    micro_batch = 32
    while micro_batch > _LEAST_MICRO_BATCH and samples < _FEWEST_STEPS * micro_batch * micro_batches:
        micro_batch //= 2
    batch = micro_batch * micro_batches
    shortest = 4 * batch
    wanted = 2 ** round(math.log2(max(samples * _QUEUE_SHARE, 1)))
    queue = int(min(max(wanted, shortest), _LONGEST_QUEUE))
    k_head = head / samples * (queue + 2 * micro_batch - 1)
    alpha = min(PUBLISHED_ALPHA, _rounded_down(ALPHA_K_OF_HEAD / k_head))
    p_head = 1 / (1 + alpha * k_head)
    steps = samples // batch
    momentum = 0.999 if steps >= 300 else 0.99
    images = sample_images(manifest, train_split)
    cores, ranks = len(os.sched_getaffinity(0)), _ranks(micro_batches)
    workers = max(1, cores // ranks - 1)
    start_from = WEIGHTS if samples < _FEW_FOR_SCRATCH and images.shorter_side > _SMALL_SIDE else None
    temperature = 0.2 if samples >= _SMALL_SET else 0.3
    reasons = (
        f"step {micro_batches} x {micro_batch}: "
        + (
            "the published runs'"
            if micro_batches == 4
            else f"less than the published 4 x 32, since {samples:,} images are few"
        )
        + f"; {steps:,} steps an epoch",
        f"queue {queue}: about 7 % of an epoch as on ImageNet-LT, within 4 steps' {shortest} and the published "
        f"{_LONGEST_QUEUE}; a queue that is long compared with the training lowers Many",
        f"alpha {alpha:g}: K = {k_head:.0f} keys of the largest class, so alpha K = {alpha * k_head:.1f} and its "
        f"center's optimum is {p_head:.2f}; ImageNet-LT has 4.5 and 0.18",
        f"temperature {temperature:g}: " + ("published" if temperature == 0.2 else "did better than 0.2 on small sets"),
        f"key momentum {momentum:g}: an average over {1 / (1 - momentum):.0f} steps, "
        + ("as published" if momentum == 0.999 else "since an epoch has few"),
        f"{workers} loader processes a rank: this host has {cores} cores for {ranks} "
        + ("rank" if ranks == 1 else "ranks"),
        f"mean {_short(images.mean)}, deviation {_short(images.std)} of the pixels of {images.read} images; the shards "
        f"normalise by {_short(manifest.mean)} and {_short(manifest.std)}: build them again from card.yaml to have the "
        "first, keep the second with weights from ImageNet",
        *(
            f"weights: {samples:,} images are few to train from scratch: --set model.start_from={name} downloads those "
            "of ImageNet once, or give a file of weights"
            for name in [start_from] * (start_from is not None)
        ),
        *(
            f"of {images.read + len(images.unread)} images sampled, {len(images.unread)} cannot be read: {name}"
            for name in images.unread[:1]
        ),
    )
    return Suggestion(
        alpha, temperature, queue, micro_batch, micro_batches, momentum, images, workers, start_from, reasons
    )


def accelerators() -> int:
    """GPUs of this host that NVIDIA's driver shows, without loading torch."""
    return len([name for name in os.listdir("/dev") if re.fullmatch(r"nvidia\d+", name)])


def _ranks(micro_batches: int) -> int:
    """The most ranks that this host has GPUs for and that can share the micro-batches of a step."""
    return max(n for n in range(1, micro_batches + 1) if micro_batches % n == 0 and n <= max(accelerators(), 1))


def command_of(recipe: Path, suggestion: Suggestion) -> str:
    """A command that trains the recipe on this host, from this folder."""
    ranks = _ranks(suggestion.micro_batches)
    script = "paco-train" if shutil.which("paco-train") else f"{sys.executable} {_TRAIN}"
    start = ["--ranks", str(ranks)] if ranks > 1 else []
    weights = ["--set", f"model.start_from={suggestion.start_from}"] if suggestion.start_from else []
    return " ".join([script, *start, "--config", shlex.quote(str(recipe)), *weights, "--output", "runs/suggested"])


def _short(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def _rounded_down(value: float) -> float:
    """Round down to one significant digit: 0.0347 to 0.03."""
    digit = 10.0 ** math.floor(math.log10(value))
    return round(math.floor(value / digit + 1e-9) * digit, 12)


def histogram(counts: Sequence[int]) -> list[tuple[str, int, int]]:
    """Rows (range of images per class, classes, total images), ascending; bounds double."""
    rows = []
    array = np.array(counts)
    low = 0
    while low <= array.max():
        high = max(2 * low - 1, low)
        inside = array[(array >= low) & (array <= high)]
        if len(inside):
            rows.append((str(low) if low == high else f"{low:,}-{high:,}", len(inside), int(inside.sum())))
        low = high + 1
    return rows


def sample_images(manifest: Manifest, split: str) -> Sampled:
    """Sizes and colors of a sample of images that lie evenly in a split.

    Raises:
        DataError: none of them can be read.
    """
    reader = ShardReader(manifest.storage, manifest.split(split))
    sides, unread, moments = [], [], []
    for sample_id in np.unique(np.linspace(0, len(reader) - 1, _SAMPLED).astype(int)).tolist():
        try:
            sample = reader.read(sample_id)
            pixels = colors_of(sample.image).reshape(-1, 3) / 255
            moments.append((pixels.mean(0), (pixels**2).mean(0)))
            sides.append(min(size_of(sample.image)))
        except BadSample as error:
            unread.append(str(error))
        except BadImage as error:
            unread.append(f"{sample.key} of {sample.shard}: {error.reason}")
    if not sides:
        raise DataError(
            f"none of the images of {manifest.storage.url} could be read, the first: {unread[0]}; "
            "paco-build-shards check lists the damage"
        )
    mean, square = np.mean(moments, axis=0)
    std = np.sqrt(np.maximum(square - mean**2, 1e-6))
    side, mean, std = int(np.median(sides)), mean.round(4).tolist(), std.round(4).tolist()
    return Sampled(side, tuple(mean), tuple(std), len(sides), tuple(unread))


def card_of(manifest: Manifest, suggestion: Suggestion) -> dict[str, Any]:
    """A card for repacking these shards, or a long-tailed subset of them."""
    return {
        "name": manifest.name,
        "license": manifest.license,
        "source": "webdataset",
        "root": manifest.storage.url if not manifest.storage.is_local else str(manifest.directory.resolve()),
        "mean": list(suggestion.images.mean),
        "std": list(suggestion.images.std),
        **({"background": manifest.background} if manifest.background else {}),
        "shots": manifest.shots.model_dump(),
        "splits": {name: {"tars": _tars(split)} for name, split in manifest.splits.items()},
    }


def _tars(split: Split) -> str:
    """The pattern of a split's own tars: `add` puts later ones beside them."""
    names = [shard.name for shard in split.shards]
    ends = [name.removeprefix(f"{split.name}-") for name in names]
    if len(names) == 1:
        return split.shards[0].file
    first = int(ends[0]) if ends[0].isdecimal() else 0
    in_order = ends == [f"{number:0{len(ends[0])}d}" for number in range(first, first + len(ends))]
    return f"{split.name}-{{{ends[0]}..{ends[-1]}}}.tar" if in_order else f"{{{','.join(names)}}}.tar"


def recipe_of(manifest: Manifest, suggestion: Suggestion, folder: Path) -> dict[str, Any]:
    """A recipe for these shards, with paths relative to its folder."""
    small = suggestion.images.shorter_side <= _SMALL_SIDE
    side = suggestion.images.shorter_side if small else 224
    small_view = {"name": "small", "size": side, "cutout": 0}
    splits = manifest.splits
    steps = manifest.split("train").samples // (suggestion.micro_batch * suggestion.micro_batches)
    return {
        "name": "".join(c if c.isalnum() else "_" for c in manifest.name.lower()),
        "data": {
            "shards": _path(manifest.storage.url, folder),
            "classes": len(manifest.classes),
            "workers": suggestion.workers,
        },
        "views": {
            "query": small_view if small else {"name": "randcls"},
            "key": dict(small_view) if small else {"name": "sim"},
            "evaluation": {"name": "eval", "size": side, "resize": side if small else 256},
        },
        "model": {"backbone": "cifar_resnet20" if small else "resnet50", "projection_dim": 64 if small else 128},
        "loss": {"method": "paco", "alpha": suggestion.alpha, "temperature": suggestion.temperature},
        "key_encoder": {"momentum": suggestion.key_momentum},
        "queue": {"length": suggestion.queue},
        "step": {"micro_batch": suggestion.micro_batch, "micro_batches": suggestion.micro_batches},
        "optimizer": {"lr": 0.1 if small else 0.02, "weight_decay": 5e-4},
        "schedule": {
            "epochs": 100 if steps >= 300 else 200,
            "warmup_epochs": 5 if small else 10,
            "per": "step" if small else "epoch",
        },
        "engine": {"precision": "auto"},
        "evaluation": {
            "every_epochs": 5,
            "split": "val" if "val" in splits else None,
            "test_split": "val" if "val" in splits and "test" not in splits else "test",
            "batch": 64,
        },
    }


def write_files(manifest: Manifest, suggestion: Suggestion, folder: Path, overwrite: bool) -> tuple[Path, Path]:
    """Write card.yaml and recipe.yaml.

    Raises:
        DataError: one exists, and `overwrite` is off.
    """
    content = {
        "card.yaml": (
            f"# The shards of {' '.join(manifest.name.split())} as a source.\n",
            card_of(manifest, suggestion),
        ),
        "recipe.yaml": (
            "".join(f"# {line}\n" for line in ("Suggested by paco-build-shards suggest:", *suggestion.reasons)),
            recipe_of(manifest, suggestion, folder),
        ),
    }
    there = [name for name in content if (folder / name).exists()]
    if there and not overwrite:
        raise DataError(f"{folder / there[0]} exists; give another --output, or --overwrite to replace it")
    folder.mkdir(parents=True, exist_ok=True)
    for name, (head, tree) in content.items():
        text = head + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder / "card.yaml", folder / "recipe.yaml"


def _path(place: str, folder: Path) -> str:
    return place if "://" in place else os.path.relpath(place, folder)

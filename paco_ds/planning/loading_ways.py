"""Cores that a node needs to feed its GPUs, by each way to make training views."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import cv2
import numpy as np
import simplejpeg

from paco_ds.config.data import DataSettings
from paco_ds.config.views import TrainView, ViewDevice, erases
from paco_ds.data.manifest import Manifest
from paco_ds.data.pack.image_bytes import BadImage, ending_of, resized
from paco_ds.data.shard import BadSample, RawSample, ShardReader
from paco_ds.errors import DataError
from paco_ds.planning.loading import loading_rate, plan_loading
from paco_ds.randomness import DrawPurpose, permutation

_DEVICES: tuple[ViewDevice, ...] = ("cpu", "accelerator")


@dataclass(frozen=True)
class Way:
    """A way to make training views, the images/s of one worker with it, and the cores that a node needs."""

    name: str
    per_worker: float
    cores: int


def plan_ways(
    data: DataSettings,
    views: Sequence[TrainView],
    manifest: Manifest | None,
    *,
    per_gpu: float,
    gpus: int,
    short: int,
    seconds: float = 1.5,
) -> list[Way]:
    """Cores that feed a node's GPUs by each way, from rates measured here on samples that lie in memory.

    Args:
        manifest: whose training images are taken; None for made-up photographs of 600 x 450 pixels.
        per_gpu: images/s of one GPU.
        gpus: of the node.
        short: shorter side in pixels of smaller shards, which are made up from the samples.

    Raises:
        UserError: a figure out of range.
        DataError: no sample can be read.
    """
    samples = _made_up() if manifest is None else _some(manifest, data)
    smaller = [_smaller(sample, short) for sample in samples]
    devices, ways = _DEVICES[:1] if any(map(erases, views)) else _DEVICES, []
    for of, stored in (("", samples), (f", shards built with --resize-short {short}", smaller)):
        for device in devices:
            rate = loading_rate(partial(_taken, stored), data, views, 0, seconds, device)
            if not rate:
                raise DataError(f"no sample of {data.shards} could be decoded; run paco-build-shards check on it")
            plan = plan_loading(rate, per_gpu, gpus, 0, measured=False)
            ways.append(Way(f"views.device={device}{of}", rate, gpus * (plan.workers + 1)))
    return ways


def ways_in_words(ways: Sequence[Way], per_gpu: float, gpus: int, *, made_up: bool) -> list[str]:
    """A line for each way."""
    of = "made-up photographs of 600 x 450 pixels" if made_up else "your training images"
    lines = [
        f"cores of a node of {gpus} GPUs at {per_gpu:g} images/s each: one for each rank and its workers, which make "
        f"a quarter more (one core of this machine, {of} in memory)"
    ]
    return lines + [f"  {way.cores:4d} cores  {way.name} ({way.per_worker:.0f} images/s a core)" for way in ways]


def _some(manifest: Manifest, data: DataSettings, count: int = 64) -> list[RawSample]:
    with ShardReader(manifest.storage, manifest.split(data.train_split)) as reader:
        order = permutation(len(reader), DrawPurpose.WINDOW, 0)[:count]
        found = []
        for sample_id in order.tolist():
            with suppress(BadSample):
                found.append(reader.read(sample_id))
    if not found:
        raise DataError(f"no sample of {data.shards} could be read; run paco-build-shards check on it")
    return found


def _made_up(count: int = 8) -> list[RawSample]:
    """JPEGs about as large as those of photographs: 90 kB of 600 x 450 pixels."""
    rng = np.random.default_rng(0)
    samples = []
    for number in range(count):
        smooth = cv2.resize(
            rng.integers(0, 256, (45, 60, 3), dtype=np.uint8), (600, 450), interpolation=cv2.INTER_CUBIC
        )
        pixels = cv2.add(smooth, rng.integers(0, 20, smooth.shape, dtype=np.uint8))
        samples.append(RawSample(f"{number}", 0, "made up", simplejpeg.encode_jpeg(pixels, 88, colorsubsampling="420")))
    return samples


def _smaller(sample: RawSample, short: int) -> RawSample:
    """As `paco-build-shards build --resize-short` would have stored it; as it is if it cannot be."""
    try:
        data, _ = resized(sample.image, ending_of(sample.image), short, 90)
    except BadImage:
        return sample
    return replace(sample, image=bytes(data))


def _taken(samples: Sequence[RawSample], number: int) -> RawSample:
    return samples[number % len(samples)]

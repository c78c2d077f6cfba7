"""Decode stored samples, augment them to views, and collate the views of a micro-batch.

A bad sample is replaced by another of its class and reported.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from paco_ds.data.shard import BadSample, RawSample, ShardReader, Stored, remedy_of
from paco_ds.data.stream.partition import Planned, TrainingPlan, this_worker
from paco_ds.data.stream.views import MakeRawViews, MakeViews, RawBatch, RawView, raw_batch
from paco_ds.errors import DataError
from paco_ds.randomness import DrawPurpose, generator


@dataclass(frozen=True)
class Replaced:
    """A bad sample that was replaced, or left out of an evaluation: its key, its shard, and the reason."""

    key: str
    shard: str
    reason: str

    def __str__(self) -> str:
        return f"{self.key} of {self.shard}: {self.reason}"


@dataclass(frozen=True)
class Part:
    """A loader process's share of a micro-batch.

    Attributes:
        views: uint8 [views, images, 3, H, W] in one shared memory; without `raw`.
        raw: of each view, the pixels of all images one after the other, and what else `render` needs.
    """

    views: Tensor | None
    labels: np.ndarray
    ids: np.ndarray
    valid: np.ndarray
    replaced: tuple[Replaced, ...] = ()
    raw: tuple[tuple[Tensor, RawBatch], ...] = ()


@dataclass(frozen=True)
class Loaded:
    """A sample's views: for the query (or evaluation), and for the key if there is one. They are uint8 [size, size, 3],
    of five crops [5 size, size, 3], or yet to be rendered."""

    plan: Planned
    views: tuple[np.ndarray, ...] | tuple[RawView, ...]
    label: int
    replaced: tuple[Replaced, ...] = ()


@dataclass(frozen=True)
class Load:
    """Decodes a planned sample to its views. A bad sample is replaced in training; in evaluation it is an error.

    With `blank` it is left out of an evaluation: a black view of this (height, width) that is not valid stands in its
    place.
    """

    reader: ShardReader
    make_views: MakeViews | MakeRawViews
    seed: int
    substitute: bool
    blank: tuple[int, int] | None = None

    def __call__(self, sample: tuple[Planned, Stored]) -> Loaded:
        plan, stored = sample
        try:
            return self._loaded(plan, stored.sample())
        except BadSample as bad:
            if self.substitute:
                return self._substitute(plan, bad)
            if self.blank is not None:
                view = np.zeros((*self.blank, 3), np.uint8)
                named = (Replaced(bad.key, bad.shard, bad.reason),) if plan.valid else ()
                return Loaded(replace(plan, valid=False), (view,), label=0, replaced=named)
            raise DataError(
                f"sample {bad.key} of {bad.shard} cannot be evaluated ({bad.reason}); without it the accuracy "
                f"would be that of another set. {remedy_of([bad.reason], self.reader.storage.url)} "
                f"evaluation.max_bad_share lets a share be left out by name"
            ) from bad

    def _loaded(self, plan: Planned, raw: RawSample) -> Loaded:
        streams = _VIEW_STREAMS[: len(self.make_views.views)]
        rngs = [generator(stream, self.seed, plan.epoch, plan.position) for stream in streams]
        return Loaded(plan, self.make_views(raw, *rngs), raw.label)

    def _substitute(self, plan: Planned, bad: BadSample) -> Loaded:
        """Another sample of the class (of any class if none can be read), a function of (seed, epoch, position)."""
        rng = generator(DrawPurpose.SUBSTITUTE, self.seed, plan.epoch, plan.position)
        samples = len(self.reader)
        classmates = rng.permutation(self.reader.ids_of_class(int(self.reader.labels()[plan.sample_id])))
        anyone = (int(rng.integers(samples)) for _ in range(_MOST_TRIES))
        replaced = [Replaced(bad.key, bad.shard, bad.reason)]
        for candidate in itertools.chain(classmates[:_MOST_TRIES], anyone):
            if candidate == plan.sample_id:
                continue
            try:
                return replace(self._loaded(plan, self.reader.read(int(candidate))), replaced=tuple(replaced))
            except BadSample as also_bad:
                replaced.append(Replaced(also_bad.key, also_bad.shard, also_bad.reason))
        names = ", ".join(f"{r.key} ({r.reason})" for r in replaced[:5])
        raise DataError(
            f"{len(replaced)} samples in a row cannot be read: {names}, ... "
            f"{remedy_of([r.reason for r in replaced], self.reader.storage.url)}"
        )


_MOST_TRIES = 100  # if a hundred draws in a row fail, the data set is damaged
_VIEW_STREAMS = (DrawPurpose.QUERY_VIEW, DrawPurpose.KEY_VIEW)


def collate(samples: Sequence[Loaded]) -> Part:
    """Stack the views and labels of some images of a micro-batch."""
    views: list[list[Any]] = [[sample.views[number] for sample in samples] for number in range(len(samples[0].views))]
    raw = isinstance(views[0][0], RawView)
    return Part(
        views=None if raw else _stacked(views),
        labels=np.array([s.label for s in samples]),
        ids=np.array([s.plan.sample_id for s in samples]),
        valid=np.array([s.plan.valid for s in samples]),
        replaced=tuple(r for s in samples for r in s.replaced),
        raw=tuple(map(_joined, views)) if raw else (),
    )


def _stacked(views: Sequence[Sequence[np.ndarray]]) -> Tensor:
    height, width, channels = views[0][0].shape
    stacked = torch.empty((len(views), len(views[0]), channels, height, width), dtype=torch.uint8)
    for of_view, images in zip(stacked, views, strict=True):
        for planes, image in zip(of_view, images, strict=True):
            cv2.split(image, list(planes.numpy()))  # ten times faster than numpy's transposition
    return stacked


def _joined(views: Sequence[RawView]) -> tuple[Tensor, RawBatch]:
    batch = raw_batch(views)
    pixels = torch.empty(0, dtype=torch.uint8)
    if get_worker_info() is not None:  # to which a loader process would copy it otherwise, as torch's own collate knows
        pixels = pixels.set_(torch.UntypedStorage._new_shared(batch.bytes))
    pixels.resize_(batch.bytes)
    place, flat = 0, pixels.numpy()
    for view in views:
        patch = view.patch.pixels
        flat[place : place + patch.size].reshape(patch.shape)[:] = patch
        place += patch.size
    return pixels, batch


@dataclass(frozen=True)
class CollatePart:
    """Collates a loader process's share of each micro-batch; the share is known only inside the process."""

    plan: TrainingPlan

    def __call__(self, samples: Iterable[Loaded]) -> Iterator[Part]:
        samples = iter(samples)
        for size in itertools.cycle(map(len, self.plan.slots_of(*this_worker()))):
            part = list(itertools.islice(samples, size))
            if not part:
                return
            yield collate(part)

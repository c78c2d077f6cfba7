"""The stream: planned samples read from shards, decoded, turned into views and batched, as a webdataset pipeline.

Training yields one optimizer step of this rank at a time: its micro-batches, each with both views as bytes (the keys of
all micro-batches are needed before the first query). Each loader process makes a part of every micro-batch, so any
number of processes gives the same bytes, and together they read and hold no more than one would. A bad sample is
replaced by another of its class and reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import webdataset as wds
from torch import Tensor

from paco_ds.config.data import DataSettings
from paco_ds.config.views import EvalView, TrainView
from paco_ds.data.manifest import Manifest
from paco_ds.data.shard import ShardReader
from paco_ds.data.stream.load import CollatePart, Load, Part, Replaced, collate
from paco_ds.data.stream.loader_processes import start_loading
from paco_ds.data.stream.partition import EvaluationPlan, TrainingPlan, micro_batches_ahead, shards_at_once
from paco_ds.data.stream.read_ahead import EvaluationSamples, TrainingSamples
from paco_ds.data.stream.sampler import ClassSampler, SharedLabels
from paco_ds.data.stream.views import MakeRawViews, MakeViews, concatenated, make_view, render
from paco_ds.distributed.launch import local_world_size
from paco_ds.distributed.ranks import MicroBatchLayout
from paco_ds.errors import RecipeError


@dataclass(frozen=True)
class MicroBatch:
    """m images: `query` and `key` uint8 [m, 3, H, W] (`key` None without a key encoder), `labels` int64 [m].

    Images are on the device if they were rendered there. Five crops of an evaluation are below one another, `query`
    [m, 3, 5 H, W]. `ids` int64 [m] are the planned sample ids; `valid` bool [m] is False where an evaluation batch is
    padded.
    """

    query: Tensor
    key: Tensor | None
    labels: Tensor
    ids: Tensor
    valid: Tensor
    replaced: tuple[Replaced, ...] = ()


@dataclass(frozen=True)
class RenderOn:
    """Where raw views are rendered, and the side of a view in pixels."""

    device: torch.device
    size: int


def join(parts: Sequence[Part], render_on: RenderOn | None = None) -> MicroBatch:
    """Concatenate the parts of a micro-batch; in pinned memory with a GPU, so that the copy overlaps computation.

    Raw views are rendered, for which `render_on` is needed.
    """
    views = _finished(parts) if render_on is None else _rendered(parts, render_on)
    return MicroBatch(
        query=views[0],
        key=views[1] if len(views) > 1 else None,
        labels=torch.from_numpy(np.concatenate([part.labels for part in parts])),
        ids=torch.from_numpy(np.concatenate([part.ids for part in parts])),
        valid=torch.from_numpy(np.concatenate([part.valid for part in parts])),
        replaced=tuple(r for part in parts for r in part.replaced),
    )


def _finished(parts: Sequence[Part]) -> list[Tensor]:
    views = [part.views for part in parts if part.views is not None]
    return [_joined([part[number] for part in views]) for number in range(len(views[0]))]


def _rendered(parts: Sequence[Part], render_on: RenderOn) -> Sequence[Tensor]:
    """The views of a micro-batch, together: loader processes make any share of it, but the batch is the same."""
    of_views = [raw for of_view in zip(*(part.raw for part in parts), strict=True) for raw in of_view]
    pixels, batch = _joined([pixels for pixels, _ in of_views]), concatenated([batch for _, batch in of_views])
    views = render(pixels, batch, render_on.size, render_on.device)
    return views.chunk(len(parts[0].raw))


def _joined(images: list[Tensor]) -> Tensor:
    if len(images) == 1 and not torch.cuda.is_available():
        return images[0]
    shape = (sum(len(each) for each in images), *images[0].shape[1:])
    out = torch.empty(shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    return torch.cat(images, out=out)


class TrainingStream:
    """Iterates over optimizer steps: a list of this rank's micro-batches each. Loader processes start here.

    Args:
        views: of each training image, see `Recipe.training_views`.
        start: global step to begin with; every later one follows until the last epoch.
        render_on: loader processes only decode and crop, and this device does the rest; None: they make whole views.
    """

    def __init__(
        self,
        data: DataSettings,
        views: Sequence[TrainView],
        manifest: Manifest,
        layout: MicroBatchLayout,
        *,
        seed: int,
        epochs: int,
        start: int = 0,
        render_on: RenderOn | None = None,
    ) -> None:
        split = manifest.split(data.train_split)
        reader = ShardReader(manifest.storage, split)
        refuse_small_cache(data, manifest, layout, local_world_size())
        sampler = None
        if data.sampler != "instance_balanced":
            sampler = ClassSampler(
                data.sampler,
                reader.counts,
                SharedLabels(reader.labels()),
                split.class_counts,
                seed=seed,
                epochs=epochs,
            )
        self.plan = TrainingPlan(
            reader.counts,
            layout,
            seed=seed,
            window=data.window,
            start=start,
            epochs=epochs,
            sampler=sampler,
        )
        drawn, self._render_on = tuple(map(make_view, views)), render_on
        make_views: MakeViews | MakeRawViews = MakeViews(drawn, data.max_pixels)
        if render_on is not None:
            make_views = MakeRawViews(drawn, data.max_pixels, render_on.size)
        pipeline = wds.DataPipeline(
            TrainingSamples(self.plan, reader),
            wds.map(Load(reader, make_views, seed, substitute=True)),
            CollatePart(self.plan),
        )
        workers = min(data.workers, layout.micro_batch)  # each makes at least one image of a micro-batch
        self._accumulation, self._parts_of_each = layout.accumulation, max(workers, 1)
        # the whole next step is prefetched while the current one is computed
        self._parts = start_loading(pipeline, workers, ahead=micro_batches_ahead(layout))

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        return [self._micro_batch() for _ in range(self._accumulation)]

    def close(self) -> None:
        """End the loader processes."""
        del self._parts

    def _micro_batch(self) -> MicroBatch:
        return join([next(self._parts) for _ in range(self._parts_of_each)], self._render_on)


def refuse_small_cache(data: DataSettings, manifest: Manifest, layout: MicroBatchLayout, ranks: int) -> None:
    """Raise RecipeError if data.cache cannot hold the shards that the ranks of a host read from at the same time.

    Such a cache would fetch whole shards repeatedly, for one window each. Without a cache only ranges are read.
    """
    cache, split = data.cache, manifest.split(data.train_split)
    if cache is None and manifest.storage.is_pipe:
        raise RecipeError(
            "a pipe: command gives whole shards, not ranges: set data.cache.directory and data.cache.bytes"
        )
    if cache is None or manifest.storage.is_local:
        return
    counts = [shard.samples for shard in split.shards]
    shards = shards_at_once(counts, layout, data.window, ranks)
    needed = sum(sorted((shard.bytes for shard in split.shards), reverse=True)[:shards])
    if cache.bytes < needed:
        raise RecipeError(
            f"data.cache.bytes {cache.bytes} cannot hold the {shards} shards that {ranks} ranks of this host read from "
            f"at the same time: raise it to {needed}, or leave data.cache out to read ranges only"
        )


def evaluation_stream(
    data: DataSettings,
    view: EvalView,
    manifest: Manifest,
    split: str,
    batch: int,
    rank: int = 0,
    world_size: int = 1,
    leave_out_bad: bool = False,
) -> Iterator[MicroBatch]:
    """Batches of a split, every image exactly once over all ranks, equally many batches on each. A bad sample is an
    error, or with `leave_out_bad` not valid and named in `replaced`."""
    reader = ShardReader(manifest.storage, manifest.split(split))
    make_views = MakeViews((make_view(view),), data.max_pixels)
    blank = (view.number_of_crops * view.size, view.size) if leave_out_bad else None
    pipeline = wds.DataPipeline(
        EvaluationSamples(EvaluationPlan(len(reader), batch, rank, world_size), reader),
        wds.map(Load(reader, make_views, seed=0, substitute=False, blank=blank)),
        wds.batched(batch, collation_fn=collate),
    )
    for part in start_loading(pipeline, data.workers):
        yield join([part])

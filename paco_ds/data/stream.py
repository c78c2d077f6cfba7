"""The stream: planned samples read from shards, decoded, turned into views and batched, as a webdataset pipeline.

Training yields one optimizer step of this rank at a time: its micro-batches, each with both views as bytes (keys
are needed for all of them before the first query). Loader processes each make a part of every micro-batch, so any
number of them gives the same bytes, and together they read and hold no more than one would. A bad sample keeps its
place: another of its class stands in, and it is reported.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker

import cv2
import numpy as np
import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import DataLoader

from paco_ds.data.manifest import Manifest
from paco_ds.data.plan import EvaluationPlan, Planned, TrainingPlan, shards_at_once, this_worker
from paco_ds.data.read_ahead import EvaluationSamples, TrainingSamples
from paco_ds.data.sampler import ClassSampler
from paco_ds.data.shard import BadSample, RawSample, ShardReader, Stored
from paco_ds.data.views import View, make_view
from paco_ds.distributed import MicroBatchLayout, local_world_size
from paco_ds.errors import DataError, RecipeError, UserError
from paco_ds.randomness import Stream, generator
from paco_ds.recipe import Recipe


@dataclass(frozen=True)
class Replaced:
    """A sample that could not be used, and the place its substitute took."""

    key: str
    shard: str
    reason: str


@dataclass(frozen=True)
class MicroBatch:
    """m images: `query` and `key` uint8 [m, 3, H, W] (`key` None without a key encoder), `labels` int64 [m].

    `ids` int64 [m] are the planned sample ids; `valid` bool [m] is False where an evaluation batch is padded.
    """

    query: Tensor
    key: Tensor | None
    labels: Tensor
    ids: Tensor
    valid: Tensor
    replaced: tuple[Replaced, ...] = ()


@dataclass(frozen=True)
class Part:
    """What a loader process made of a micro-batch: `views` uint8 [views, images, 3, H, W], of one shared memory."""

    views: Tensor
    labels: np.ndarray
    ids: np.ndarray
    valid: np.ndarray
    replaced: tuple[Replaced, ...] = ()


@dataclass(frozen=True)
class Loaded:
    """A decoded sample: `image` uint8 [H, W, 3]."""

    plan: Planned
    image: np.ndarray
    label: int
    replaced: tuple[Replaced, ...] = ()


@dataclass(frozen=True)
class Load:
    """Reads and decodes a planned sample; in training a bad one is replaced, in evaluation it is an error."""

    reader: ShardReader
    seed: int
    substitute: bool

    def __call__(self, sample: tuple[Planned, Stored]) -> Loaded:
        plan, stored = sample
        try:
            return self._loaded(plan, stored.sample())
        except BadSample as bad:
            if not self.substitute:
                raise DataError(
                    f"sample {bad.key} of {bad.shard} cannot be evaluated ({bad.reason}); an accuracy without it would "
                    f"be of another set. Copy the shard again, or rebuild it; tools/build_shards.py check finds all"
                ) from bad
            return self._substitute(plan, bad)

    def _loaded(self, plan: Planned, raw: RawSample) -> Loaded:
        return Loaded(plan, decode(raw), raw.label)

    def _substitute(self, plan: Planned, bad: BadSample) -> Loaded:
        """Another sample of the class (any, if none can be read), a function of (seed, epoch, position)."""
        rng = generator(Stream.SUBSTITUTE, self.seed, plan.epoch, plan.position)
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
            f"{len(replaced)} samples drawn one after the other are unreadable: {names}, ... "
            f"Run tools/build_shards.py check on the shards' directory"
        )


_MOST_TRIES = 100  # a set of which a hundred draws fail is not worth reading on


def decode(raw: RawSample) -> np.ndarray:
    """Image file bytes to uint8 [H, W, 3] RGB; grey becomes three equal channels.

    Raises:
        BadSample: the bytes are no image that can be decoded.
    """
    try:
        image = cv2.imdecode(np.frombuffer(raw.image, np.uint8), cv2.IMREAD_COLOR_RGB) if raw.image else None
    except cv2.error:  # a header that promises more pixels than OpenCV allows
        image = None
    if image is None:
        raise BadSample("undecodable", raw.key, raw.shard)
    return image


@dataclass(frozen=True)
class MakeViews:
    """Draws the views of a loaded sample."""

    query: View
    key: View | None
    seed: int

    def __call__(self, sample: Loaded) -> tuple[Loaded, np.ndarray, np.ndarray | None]:
        plan = sample.plan
        draws = [
            view and view(sample.image, generator(stream, self.seed, plan.epoch, plan.position))
            for stream, view in ((Stream.QUERY_VIEW, self.query), (Stream.KEY_VIEW, self.key))
        ]
        return replace(sample, image=_NO_PIXELS), draws[0], draws[1]  # type: ignore[return-value]


_NO_PIXELS = np.empty((0, 0, 3), np.uint8)  # once views are drawn the decoded image need not wait in a batch


def collate(samples: Sequence[tuple[Loaded, np.ndarray, np.ndarray | None]]) -> Part:
    """Views and labels of some images of a micro-batch."""
    loaded, queries, keys = zip(*samples, strict=True)
    views = [queries] if keys[0] is None else [queries, keys]
    height, width, channels = queries[0].shape
    together = torch.empty((len(views), len(loaded), channels, height, width), dtype=torch.uint8)
    for view, images in enumerate(views):
        for number, image in enumerate(images):
            together[view, number].numpy()[:] = image.transpose(2, 0, 1)
    return Part(
        views=together,
        labels=np.array([s.label for s in loaded]),
        ids=np.array([s.plan.sample_id for s in loaded]),
        valid=np.array([s.plan.valid for s in loaded]),
        replaced=tuple(r for s in loaded for r in s.replaced),
    )


def join(parts: Sequence[Part]) -> MicroBatch:
    """The micro-batch of its parts; page-locked where there is a GPU, to which it then goes while that computes."""
    first = parts[0].views
    views = [_joined([part.views[view] for part in parts]) for view in range(len(first))]
    return MicroBatch(
        query=views[0],
        key=views[1] if len(views) > 1 else None,
        labels=torch.from_numpy(np.concatenate([part.labels for part in parts])),
        ids=torch.from_numpy(np.concatenate([part.ids for part in parts])),
        valid=torch.from_numpy(np.concatenate([part.valid for part in parts])),
        replaced=tuple(r for part in parts for r in part.replaced),
    )


def _joined(images: list[Tensor]) -> Tensor:
    if len(images) == 1 and not torch.cuda.is_available():
        return images[0]
    shape = (sum(len(each) for each in images), *images[0].shape[1:])
    out = torch.empty(shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    return torch.cat(images, out=out)


@dataclass(frozen=True)
class Together:
    """Collates the samples that a loader process makes of each micro-batch; how many, it knows only there."""

    plan: TrainingPlan

    def __call__(self, samples: Iterable[tuple[Loaded, np.ndarray, np.ndarray | None]]) -> Iterator[Part]:
        samples = iter(samples)
        for size in itertools.cycle(map(len, self.plan.lanes_of(*this_worker()))):
            part = list(itertools.islice(samples, size))
            if not part:
                return
            yield collate(part)


class TrainingStream:
    """Iterates over optimizer steps: a list of this rank's micro-batches each. Loader processes start here.

    Args:
        start: global step to begin with; every later one follows until the recipe's last epoch.
    """

    def __init__(self, recipe: Recipe, manifest: Manifest, layout: MicroBatchLayout, start: int = 0) -> None:
        split = manifest.split(recipe.data.train_split)
        reader = ShardReader(manifest.storage, split)
        refuse_small_cache(recipe, manifest, layout, local_world_size())
        sampler = ClassSampler(
            recipe.data.sampler,
            reader.counts,
            reader,
            split.class_counts,
            seed=recipe.seed,
            epochs=recipe.schedule.epochs,
        )
        self.plan = TrainingPlan(
            reader.counts,
            layout,
            seed=recipe.seed,
            window=recipe.data.window,
            start=start,
            epochs=recipe.schedule.epochs,
            sampler=None if recipe.data.sampler == "instance_balanced" else sampler,
        )
        key_view = make_view(recipe.views.key) if recipe.loss.contrast else None
        pipeline = wds.DataPipeline(
            TrainingSamples(self.plan, reader),
            wds.map(Load(reader, recipe.seed, substitute=True)),
            wds.map(MakeViews(make_view(recipe.views.query), key_view, recipe.seed)),
            Together(self.plan),
        )
        workers = min(recipe.data.workers, layout.micro_batch)  # each makes at least one image of a micro-batch
        self._accumulation, self._parts_of_each = layout.accumulation, max(workers, 1)
        self._parts = _parts(pipeline, workers)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        return [self._micro_batch() for _ in range(self._accumulation)]

    def close(self) -> None:
        """End the loader processes."""
        del self._parts

    def _micro_batch(self) -> MicroBatch:
        return join([next(self._parts) for _ in range(self._parts_of_each)])


def refuse_small_cache(recipe: Recipe, manifest: Manifest, layout: MicroBatchLayout, ranks: int) -> None:
    """Raise RecipeError where data.cache would not hold the shards that the ranks of a host read from at one time.

    Such a cache would fetch whole shards again and again, for a window each.
    """
    cache, split = recipe.data.cache, manifest.split(recipe.data.train_split)
    if cache is None or manifest.storage.is_local:
        return
    counts = [shard.samples for shard in split.shards]
    shards = shards_at_once(counts, layout, recipe.data.window, ranks)
    needed = sum(sorted((shard.bytes for shard in split.shards), reverse=True)[:shards])
    if cache.bytes < needed:
        raise RecipeError(
            f"data.cache.bytes {cache.bytes} cannot hold the {shards} shards that {ranks} ranks of this host read from "
            f"at one time: raise it to {needed}, or leave data.cache out, and only ranges of shards are read"
        )


def evaluation_stream(
    recipe: Recipe, manifest: Manifest, split: str, rank: int = 0, world_size: int = 1
) -> Iterator[MicroBatch]:
    """Batches of a split, every image exactly once over all ranks, equally many batches on each."""
    reader = ShardReader(manifest.storage, manifest.split(split))
    batch = recipe.evaluation.batch
    pipeline = wds.DataPipeline(
        EvaluationSamples(EvaluationPlan(len(reader), batch, rank, world_size), reader),
        wds.map(Load(reader, recipe.seed, substitute=False)),
        wds.map(MakeViews(make_view(recipe.views.evaluation), None, recipe.seed)),
        wds.batched(batch, collation_fn=collate),
    )
    for part in _parts(pipeline, recipe.data.workers):
        yield join([part])


def _parts(pipeline: wds.DataPipeline, workers: int) -> Iterator[Part]:
    """Start the loader's processes, now, and iterate over what they make; a user's error arrives as it was raised."""
    if workers:
        # fork would copy a process that already runs threads; a fork server has none
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])  # or every worker would import torch by itself
    loader = DataLoader(
        wds.DataPipeline(pipeline, _errors_as_values),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=context if workers else None,
        worker_init_fn=_begin_worker,
    )
    with _signals_blocked():
        parts = iter(loader)
    return _raising(parts)


def _errors_as_values(parts: Iterable[Part]) -> Iterator[Part | UserError]:
    """A loader process would wrap an error's message in its traceback."""
    try:
        yield from parts
    except UserError as error:
        yield error


def _raising(parts: Iterator[Part | UserError]) -> Iterator[Part]:
    for part in parts:
        if isinstance(part, UserError):
            raise part
        yield part


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes started here do not see SIGTERM and SIGINT: launchers send those to all of a rank's processes, and
    the rank needs its images until the step under way is done. They end with the rank all the same, even if that is
    killed (`_begin_worker`)."""
    resource_tracker.ensure_running()  # which unblocks both when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(worker: int) -> None:
    """One thread for the images, and one that ends this process when its rank is gone, however that went.

    torch's loader looks for another parent instead, but the fork server stays: it waits for its workers. Workers
    left over hold on to the rank's output, and so ssh and the launcher of other hosts wait for them.
    """
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_the_rank, daemon=True).start()


def _end_with_the_rank() -> None:
    rank = multiprocessing.parent_process()
    if rank is not None:
        rank.join()  # not a child of ours: this waits for the pipe that only it holds open
        os._exit(1)

"""The stream: planned samples read from shards, decoded, turned into views and batched, as a webdataset pipeline.

Training yields one optimizer step of this rank at a time: its micro-batches, each with both views as bytes (keys
are needed for all of them before the first query). Loader workers take micro-batches in turn, so any number of
workers gives the same bytes. A bad sample keeps its place: another of its class stands in, and it is reported.
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
from paco_ds.data.plan import EvaluationPlan, Planned, TrainingPlan
from paco_ds.data.shard import BadSample, RawSample, ShardReader
from paco_ds.data.views import View, make_view
from paco_ds.distributed import MicroBatchLayout
from paco_ds.errors import DataError, UserError
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

    def pin_memory(self) -> MicroBatch:
        """Page-locked images, which go to a GPU while it computes; the loader calls this."""
        return replace(self, query=self.query.pin_memory(), key=self.key.pin_memory() if self.key is not None else None)


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

    def __call__(self, plan: Planned) -> Loaded:
        try:
            return self._load(plan, plan.sample_id)
        except BadSample as bad:
            if not self.substitute:
                raise DataError(
                    f"sample {bad.key} of {bad.shard} cannot be evaluated ({bad.reason}); an accuracy without it would "
                    f"be of another set. Copy the shard again, or rebuild it; tools/build_shards.py check finds all"
                ) from bad
            return self._substitute(plan, bad)

    def _load(self, plan: Planned, sample_id: int) -> Loaded:
        raw = self.reader.read(sample_id)
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
                return replace(self._load(plan, int(candidate)), replaced=tuple(replaced))
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


def collate(samples: Sequence[tuple[Loaded, np.ndarray, np.ndarray | None]]) -> MicroBatch:
    """Views and labels of a micro-batch as tensors."""
    loaded, queries, keys = zip(*samples, strict=True)
    return MicroBatch(
        query=_as_images(queries),
        key=None if keys[0] is None else _as_images(keys),
        labels=torch.tensor([s.label for s in loaded]),
        ids=torch.tensor([s.plan.sample_id for s in loaded]),
        valid=torch.tensor([s.plan.valid for s in loaded]),
        replaced=tuple(r for s in loaded for r in s.replaced),
    )


def _as_images(views: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.stack(views).transpose(0, 3, 1, 2)))


class TrainingStream:
    """Iterates over optimizer steps: a list of this rank's micro-batches each. Loader processes start here.

    Args:
        start: global step to begin with; every later one follows until the recipe's last epoch.
    """

    def __init__(self, recipe: Recipe, manifest: Manifest, layout: MicroBatchLayout, start: int = 0) -> None:
        reader = ShardReader(manifest.storage, manifest.split(recipe.data.train_split))
        self.plan = TrainingPlan(
            reader.counts,
            layout,
            seed=recipe.seed,
            window=recipe.data.window,
            start=start,
            epochs=recipe.schedule.epochs,
        )
        key_view = make_view(recipe.views.key) if recipe.loss.contrast else None
        pipeline = wds.DataPipeline(
            self.plan,
            wds.map(Load(reader, recipe.seed, substitute=True)),
            wds.map(MakeViews(make_view(recipe.views.query), key_view, recipe.seed)),
            wds.batched(layout.micro_batch, collation_fn=collate),
        )
        self._accumulation = layout.accumulation
        self._micro_batches = _micro_batches(pipeline, recipe.data.workers)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        return [next(self._micro_batches) for _ in range(self._accumulation)]

    def close(self) -> None:
        """End the loader processes."""
        del self._micro_batches


def evaluation_stream(
    recipe: Recipe, manifest: Manifest, split: str, rank: int = 0, world_size: int = 1
) -> Iterator[MicroBatch]:
    """Batches of a split, every image exactly once over all ranks, equally many batches on each."""
    reader = ShardReader(manifest.storage, manifest.split(split))
    batch = recipe.evaluation.batch
    pipeline = wds.DataPipeline(
        EvaluationPlan(sum(reader.counts), batch, rank, world_size),
        wds.map(Load(reader, recipe.seed, substitute=False)),
        wds.map(MakeViews(make_view(recipe.views.evaluation), None, recipe.seed)),
        wds.batched(batch, collation_fn=collate),
    )
    yield from _micro_batches(pipeline, recipe.data.workers)


def _micro_batches(pipeline: wds.DataPipeline, workers: int) -> Iterator[MicroBatch]:
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
        pin_memory=torch.cuda.is_available(),
    )
    with _signals_blocked():
        batches = iter(loader)
    return _raising(batches)


def _errors_as_values(batches: Iterable[MicroBatch]) -> Iterator[MicroBatch | UserError]:
    """A loader process would wrap an error's message in its traceback."""
    try:
        yield from batches
    except UserError as error:
        yield error


def _raising(batches: Iterator[MicroBatch | UserError]) -> Iterator[MicroBatch]:
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        yield batch


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

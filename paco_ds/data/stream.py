"""The stream: planned samples read from shards, decoded, turned into views and batched, as a webdataset pipeline.

Training yields one optimizer step of this rank at a time: its micro-batches, each with both views as bytes (keys
are needed for all of them before the first query). Loader workers take micro-batches in turn, so any number of
workers gives the same bytes. A bad sample keeps its place: another of its class stands in, and it is reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from paco_ds.data.manifest import Manifest
from paco_ds.data.order import EpochOrder, position_of
from paco_ds.data.shard import BadSample, RawSample, ShardReader
from paco_ds.data.views import View, make_view
from paco_ds.distributed import MicroBatchLayout
from paco_ds.errors import DataError
from paco_ds.recipe import Recipe

_QUERY, _KEY, _SUBSTITUTE = 0, 1, 2  # streams of a position's randomness


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
class Planned:
    """One planned sample: its id and its place in the plan."""

    sample_id: int
    epoch: int
    position: int
    valid: bool = True


@dataclass(frozen=True)
class Loaded:
    """A decoded sample: `image` uint8 [H, W, 3]."""

    plan: Planned
    image: np.ndarray
    label: int
    replaced: tuple[Replaced, ...] = ()


class TrainingPlan(IterableDataset):
    """The planned samples of this rank from a global step on, micro-batch by micro-batch.

    A loader worker yields every n-th micro-batch.
    """

    def __init__(
        self,
        counts: Sequence[int],
        layout: MicroBatchLayout,
        *,
        seed: int,
        window: int,
        start: int,
        epochs: int,
    ) -> None:
        self.counts, self.layout, self.seed, self.window = tuple(counts), layout, seed, window
        self.start, self.epochs = start, epochs
        self.steps_per_epoch = self.order(0).steps

    def order(self, epoch: int) -> EpochOrder:
        return EpochOrder(self.counts, self.layout.global_batch, seed=self.seed, epoch=epoch, window=self.window)

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def __iter__(self) -> Iterator[Planned]:
        layout, m = self.layout, self.layout.micro_batch
        worker, workers = _this_worker()
        lanes = [lane for j in layout.own for lane in layout.lanes(j)]
        window: tuple[int, int, np.ndarray] = (-1, -1, np.empty(0))
        for step in range(self.start, self.total_steps):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            number, place = divmod(step_in_epoch, self.window)
            if window[:2] != (epoch, number):
                order = self.order(epoch)
                window = (epoch, number, order.window_ids(number, lanes))
            for slot in range(layout.accumulation):
                if ((step - self.start) * layout.accumulation + slot) % workers != worker:
                    continue
                for i in range(slot * m, (slot + 1) * m):
                    position = position_of(step_in_epoch, lanes[i], layout.global_batch)
                    yield Planned(int(window[2][i, place]), epoch, position)


class EvaluationPlan(IterableDataset):
    """Every sample exactly once over all ranks, in batches padded so that every rank has equally many."""

    def __init__(self, samples: int, batch: int, rank: int, world_size: int) -> None:
        self.samples, self.batch, self.rank, self.world_size = samples, batch, rank, world_size
        self.batches = -(-samples // (batch * world_size))  # of each rank

    def __iter__(self) -> Iterator[Planned]:
        worker, workers = _this_worker()
        for number in range(worker, self.batches, workers):
            first = (number * self.world_size + self.rank) * self.batch
            for place in range(first, first + self.batch):
                valid = place < self.samples
                yield Planned(place if valid else self.samples - 1, 0, place, valid)


def _this_worker() -> tuple[int, int]:
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


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
        rng = np.random.default_rng((self.seed, plan.epoch, plan.position, _SUBSTITUTE))
        label = int(self.reader.labels()[plan.sample_id])
        replaced = [Replaced(bad.key, bad.shard, bad.reason)]
        classmates = rng.permutation(self.reader.ids_of_class(label))
        for candidate in [*classmates, *rng.permutation(len(self.reader.labels()))]:
            if candidate == plan.sample_id:
                continue
            try:
                return replace(self._load(plan, int(candidate)), replaced=tuple(replaced))
            except BadSample as also_bad:
                replaced.append(Replaced(also_bad.key, also_bad.shard, also_bad.reason))
                if len(replaced) > _MOST_TRIES:
                    break
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
    image = cv2.imdecode(np.frombuffer(raw.image, np.uint8), cv2.IMREAD_COLOR_RGB) if raw.image else None
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
            view and view(sample.image, np.random.default_rng((self.seed, plan.epoch, plan.position, number)))
            for number, view in ((_QUERY, self.query), (_KEY, self.key))
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
    """Iterates over optimizer steps: a list of this rank's micro-batches each.

    Args:
        start: global step to begin with; every later one follows until the recipe's last epoch.
    """

    def __init__(self, recipe: Recipe, manifest: Manifest, layout: MicroBatchLayout, start: int = 0) -> None:
        reader = ShardReader(manifest.directory, manifest.split(recipe.data.train_split))
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
        self._loader = _loader(pipeline, recipe.data.workers)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        step: list[MicroBatch] = []
        for micro_batch in self._loader:
            step.append(micro_batch)
            if len(step) == self._accumulation:
                yield step
                step = []


def evaluation_stream(
    recipe: Recipe, manifest: Manifest, split: str, rank: int = 0, world_size: int = 1
) -> Iterator[MicroBatch]:
    """Batches of a split, every image exactly once over all ranks, equally many batches on each."""
    reader = ShardReader(manifest.directory, manifest.split(split))
    batch = recipe.evaluation.batch
    pipeline = wds.DataPipeline(
        EvaluationPlan(sum(reader.counts), batch, rank, world_size),
        wds.map(Load(reader, recipe.seed, substitute=False)),
        wds.map(MakeViews(make_view(recipe.views.evaluation), None, recipe.seed)),
        wds.batched(batch, collation_fn=collate),
    )
    yield from _loader(pipeline, recipe.data.workers)


def _loader(pipeline: wds.DataPipeline, workers: int) -> DataLoader:
    return DataLoader(
        pipeline,
        batch_size=None,
        num_workers=workers,
        # fork would copy a process that already runs threads (metrics, DeepSpeed)
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=_one_thread,
        pin_memory=torch.cuda.is_available(),
    )


def _one_thread(worker: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)

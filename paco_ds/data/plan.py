"""Which samples this rank, and this loader process of it, takes next: the order walked through, or a split once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from paco_ds.data.order import EpochOrder, position_of
from paco_ds.distributed import MicroBatchLayout


@dataclass(frozen=True)
class Planned:
    """One planned sample: its id and its place in the plan."""

    sample_id: int
    epoch: int
    position: int
    valid: bool = True


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

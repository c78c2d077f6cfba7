"""Partition of an epoch's order, or of a split for evaluation, over ranks and their loader processes.

Loader processes share every micro-batch: each takes the same batch slots in every step, so each reads whole windows
that no other process reads. (If they took whole micro-batches in turn, each would read the windows of all batch slots.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import get_worker_info

from paco_ds.data.stream.order import EpochOrder, position_of
from paco_ds.data.stream.sampler import ClassSampler
from paco_ds.distributed.ranks import MicroBatchLayout

AHEAD = 8  # steps; a remote range takes a fraction of a second


@dataclass(frozen=True)
class Planned:
    """One planned sample: its id, and its position in the epoch; `valid` is False for padding."""

    sample_id: int
    epoch: int
    position: int
    valid: bool = True


@dataclass(frozen=True)
class Window:
    """Samples of some batch slots for the `steps` steps from global step `start`: `ids` int64 [slots, steps]."""

    start: int
    epoch: int
    start_in_epoch: int
    ids: np.ndarray

    @property
    def steps(self) -> int:
        return int(self.ids.shape[1])


class TrainingPlan:
    """The training samples of this rank, from a global step on.

    Args:
        counts: samples of each shard.
        start: first global step.
        sampler: supplies the sequence of each epoch; by default every sample occurs once.
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
        sampler: ClassSampler | None = None,
    ) -> None:
        self.counts, self.layout, self.seed, self.window = tuple(counts), layout, seed, window
        self.start, self.epochs, self.sampler = start, epochs, sampler
        # the same in every epoch and for every sampler
        self.steps_per_epoch = EpochOrder(self.counts, layout.global_batch, seed=seed, epoch=0).steps

    def order(self, epoch: int) -> EpochOrder:
        """The order of an epoch."""
        return EpochOrder(
            self.counts,
            self.layout.global_batch,
            seed=self.seed,
            epoch=epoch,
            window=self.window,
            sequence=self.sampler.sequence(epoch) if self.sampler else None,
        )

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def slots_of(self, worker: int, workers: int) -> list[list[int]]:
        """Batch slots of a loader process, the same in every step, by micro-batch of the rank."""
        m = self.layout.micro_batch
        share = slice(worker * m // workers, (worker + 1) * m // workers)
        return [list(self.layout.slots(j))[share] for j in self.layout.own]

    def windows(self, slots: Sequence[int]) -> Iterator[Window]:
        """Windows of those batch slots to the end of the last epoch; the first may start in the middle of a window."""
        step, order, order_epoch = self.start, None, -1
        while step < self.total_steps:
            epoch, in_epoch = divmod(step, self.steps_per_epoch)
            if order is None or order_epoch != epoch:
                order, order_epoch = self.order(epoch), epoch
            number, place = divmod(in_epoch, self.window)
            ids = order.window_ids(number, slots)[:, place:]
            yield Window(step, epoch, in_epoch, ids)
            step += ids.shape[1]

    def planned(self, window: Window, step: int, slot: int, row: int) -> Planned:
        """The sample of a batch slot, row `row` of the window, at a step."""
        offset = step - window.start
        position = position_of(window.start_in_epoch + offset, slot, self.layout.global_batch)
        return Planned(int(window.ids[row, offset]), window.epoch, position)


class EvaluationPlan:
    """Every sample exactly once over all ranks. Batches are padded so that every rank has equally many."""

    def __init__(self, samples: int, batch: int, rank: int, world_size: int) -> None:
        self.samples, self.batch, self.rank, self.world_size = samples, batch, rank, world_size
        self.batches = -(-samples // (batch * world_size))  # of each rank

    def batches_of(self, worker: int, workers: int) -> Iterator[list[Planned]]:
        """Batches of a loader process; the processes take turns."""
        for number in range(worker, self.batches, workers):
            first = (number * self.world_size + self.rank) * self.batch
            yield [
                Planned(min(place, self.samples - 1), 0, place, place < self.samples)
                for place in range(first, first + self.batch)
            ]


def shards_at_once(counts: Sequence[int], layout: MicroBatchLayout, window: int, ranks: int = 1) -> int:
    """Estimate of the shards that this many ranks of a host read from at the same time.

    The batch slots of a micro-batch are adjacent in the sequence. Each reads from a different shard where shards are
    shorter than batch slots; a window may extend into the next shard.
    """
    steps, in_shard = sum(counts) // layout.global_batch, sum(counts) / len(counts)
    own_shards = math.ceil(layout.micro_batch * (1 + window / in_shard))
    whole_stretch = math.ceil(layout.micro_batch * steps / in_shard) + 1
    return min(len(counts), ranks * layout.accumulation * min(own_shards, whole_stretch))


def held_bytes(bytes_a_sample: float, layout: MicroBatchLayout, window: int) -> int:
    """Upper bound on the bytes of encoded samples held by a rank, over all its loader processes.

    For each batch slot the rest of a window and the next one: one window on average, and at most `steps_ahead` more.
    """
    slots = layout.accumulation * layout.micro_batch
    return math.ceil(slots * (window + steps_ahead(window)) * bytes_a_sample)


def micro_batches_ahead(layout: MicroBatchLayout) -> int:
    """Micro-batches that a rank's loader processes prefetch: those of a step, and one more."""
    return layout.accumulation + 1


def steps_ahead(window: int) -> int:
    """Steps before the end of a window at which the next windows of all batch slots have been requested."""
    return max(1, min(AHEAD, window // 2))


def this_worker() -> tuple[int, int]:
    """(number of this loader process, number of processes); (0, 1) in the rank's own process."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)

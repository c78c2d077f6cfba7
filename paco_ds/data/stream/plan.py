"""Which samples this rank, and this loader process of it, takes next: the order walked through, or a split once.

Loader processes share every micro-batch: each takes the same slots in every step, and so reads whole windows of
slots that no other process reads. (Were they to take whole micro-batches in turn, each would need all slots.)
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

AHEAD = 8  # steps; a remote range comes in a fraction of a second


@dataclass(frozen=True)
class Planned:
    """One planned sample: its id and its place in the plan."""

    sample_id: int
    epoch: int
    position: int
    valid: bool = True


@dataclass(frozen=True)
class Window:
    """What some slots take in the `steps` steps from the global step `start` on: `ids` int64 [slots, steps]."""

    start: int
    epoch: int
    start_in_epoch: int
    ids: np.ndarray

    @property
    def steps(self) -> int:
        return int(self.ids.shape[1])


class TrainingPlan:
    """The planned samples of this rank from a global step on.

    Args:
        counts: samples of each shard.
        start: global step to begin with.
        sampler: lays out the epochs; by default every sample occurs once.
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
        # the number of steps is the same in every epoch and for every sampler
        self.steps_per_epoch = EpochOrder(self.counts, layout.global_batch, seed=seed, epoch=0).steps

    def order(self, epoch: int) -> EpochOrder:
        """The order of an epoch."""
        return EpochOrder(
            self.counts,
            self.layout.global_batch,
            seed=self.seed,
            epoch=epoch,
            window=self.window,
            line=self.sampler.line(epoch) if self.sampler else None,
        )

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def lanes_of(self, worker: int, workers: int) -> list[list[int]]:
        """Slots that a loader process takes in every step, for each of the rank's micro-batches: a run of its slots."""
        m = self.layout.micro_batch
        share = slice(worker * m // workers, (worker + 1) * m // workers)
        return [list(self.layout.slots(j))[share] for j in self.layout.own]

    def windows(self, slots: Sequence[int]) -> Iterator[Window]:
        """Windows of those slots, one after the other to the last epoch's end; the first may have begun before."""
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
        """The sample that a slot, the row-th of the window, takes in a step of it."""
        offset = step - window.start
        position = position_of(window.start_in_epoch + offset, slot, self.layout.global_batch)
        return Planned(int(window.ids[row, offset]), window.epoch, position)


class EvaluationPlan:
    """Every sample exactly once over all ranks, in batches padded so that every rank has equally many."""

    def __init__(self, samples: int, batch: int, rank: int, world_size: int) -> None:
        self.samples, self.batch, self.rank, self.world_size = samples, batch, rank, world_size
        self.batches = -(-samples // (batch * world_size))  # of each rank

    def batches_of(self, worker: int, workers: int) -> Iterator[list[Planned]]:
        """Batches of a loader process, which take them in turn."""
        for number in range(worker, self.batches, workers):
            first = (number * self.world_size + self.rank) * self.batch
            yield [
                Planned(min(place, self.samples - 1), 0, place, place < self.samples)
                for place in range(first, first + self.batch)
            ]


def shards_at_once(counts: Sequence[int], layout: MicroBatchLayout, window: int, ranks: int = 1) -> int:
    """About as many shards are read from at any time by so many ranks of a host.

    The slots of a micro-batch follow each other on the line: each reads in a shard of its own where shards are shorter
    than slots; a window may reach into the next one.
    """
    steps, in_shard = sum(counts) // layout.global_batch, sum(counts) / len(counts)
    own_shards = math.ceil(layout.micro_batch * (1 + window / in_shard))
    whole_stretch = math.ceil(layout.micro_batch * steps / in_shard) + 1
    return min(len(counts), ranks * layout.accumulation * min(own_shards, whole_stretch))


def held_bytes(bytes_a_sample: float, layout: MicroBatchLayout, window: int) -> int:
    """At most so many bytes of stored samples are held by a rank, its loader processes together.

    For each slot what is left of a window and the next one: one window on average, and `steps_ahead` more at most.
    """
    slots = layout.accumulation * layout.micro_batch
    return math.ceil(slots * (window + steps_ahead(window)) * bytes_a_sample)


def micro_batches_ahead(layout: MicroBatchLayout) -> int:
    """Micro-batches of a rank that its loader processes make before they are asked for: a step's, and one more."""
    return layout.accumulation + 1


def steps_ahead(window: int) -> int:
    """So many steps before a window ends, the next windows of all slots have been asked for."""
    return max(1, min(AHEAD, window // 2))


def this_worker() -> tuple[int, int]:
    """(number, how many) of this loader process; (0, 1) in the rank itself."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)

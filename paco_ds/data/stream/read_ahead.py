"""Prefetch of windows of encoded samples by threads, while earlier samples are decoded.

For each of its batch slots a loader process holds the rest of the current window, freed sample by sample, and possibly
the next window. The next windows are requested at different steps, spread evenly over a window, so that reads are
steady and about slots x window samples are held. At least `steps_ahead` steps lie between a request and its first
sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from torch.utils.data import IterableDataset

from paco_ds.data.shard import ShardReader, Stored
from paco_ds.data.stream.partition import EvaluationPlan, Planned, TrainingPlan, Window, steps_ahead, this_worker

_THREADS_LOCAL, _THREADS_REMOTE = 2, 16  # a remote store answers one request slowly, but many at once


class TrainingSamples(IterableDataset):
    """Planned samples and their encoded bytes, micro-batch by micro-batch: the share of this loader process."""

    def __init__(self, plan: TrainingPlan, reader: ShardReader) -> None:
        self.plan, self.reader = plan, reader

    def __iter__(self) -> Iterator[tuple[Planned, Stored]]:
        return self.share(*this_worker())

    def share(self, worker: int, workers: int) -> Generator[tuple[Planned, Stored]]:
        """The share of one of `workers` loader processes."""
        slots = [slot for of_slot in self.plan.slots_of(worker, workers) for slot in of_slot]
        self.reader.keep = max(self.reader.keep, 2 * len(slots))
        windows = self.plan.windows(slots)
        pool = ThreadPoolExecutor(_threads(self.reader), thread_name_prefix="read-ahead")
        try:
            window = next(windows, None)
            now = [self._fetch(pool, window, row) for row in range(len(slots))] if window else []
            while window is not None:
                # in a thread, since a sampler computes a new epoch here
                following = pool.submit(next, windows, None)
                later: list[Future[WindowBuffer]] = []
                for step in range(window.start, window.start + window.steps):
                    due = self._due(window, step, len(slots))
                    if (following.done() or due == len(slots)) and (coming := following.result()) is not None:
                        later += [self._fetch(pool, coming, row) for row in range(len(later), due)]
                    for row, slot in enumerate(slots):
                        planned = self.plan.planned(window, step, slot, row)
                        yield planned, now[row].result().take(planned.sample_id)
                window, now = following.result(), later
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _fetch(self, pool: ThreadPoolExecutor, window: Window, row: int) -> Future[WindowBuffer]:
        return pool.submit(WindowBuffer, self.reader, window.ids[row])

    def _due(self, window: Window, step: int, slots: int) -> int:
        """Number of batch slots whose next window has been requested at a step of this one."""
        left = window.start + window.steps - step
        quiet = steps_ahead(self.plan.window)
        spread = max(self.plan.window - quiet, 1)
        return slots * (spread - min(max(left - quiet, 0), spread)) // spread


class EvaluationSamples(IterableDataset):
    """Planned samples of a split and their encoded bytes, batch by batch; the next two batches are prefetched."""

    def __init__(self, plan: EvaluationPlan, reader: ShardReader) -> None:
        self.plan, self.reader = plan, reader

    def __iter__(self) -> Iterator[tuple[Planned, Stored]]:
        pool = ThreadPoolExecutor(2, thread_name_prefix="read-ahead")
        waiting: list[tuple[list[Planned], Future[WindowBuffer]]] = []
        try:
            for batch in self.plan.batches_of(*this_worker()):
                waiting.append((batch, pool.submit(WindowBuffer, self.reader, [p.sample_id for p in batch])))
                if len(waiting) > 2:
                    yield from _taken(*waiting.pop(0))
            for batch, held in waiting:
                yield from _taken(batch, held)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _taken(batch: list[Planned], held: Future[WindowBuffer]) -> Iterator[tuple[Planned, Stored]]:
    for planned in batch:
        yield planned, held.result().take(planned.sample_id)


class WindowBuffer:
    """The samples of a window; each is freed once it was taken as often as it was planned."""

    def __init__(self, reader: ShardReader, ids: Sequence[int] | np.ndarray) -> None:
        self._times = Counter(int(i) for i in ids)
        self._stored = {stored.sample_id: stored for stored in reader.read_window(sorted(self._times))}

    def take(self, sample_id: int) -> Stored:
        self._times[sample_id] -= 1
        return self._stored[sample_id] if self._times[sample_id] else self._stored.pop(sample_id)


def _threads(reader: ShardReader) -> int:
    return _THREADS_LOCAL if reader.storage.is_local else _THREADS_REMOTE

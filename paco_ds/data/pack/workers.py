"""Worker processes for shards: jobs are created one at a time, settings are sent once, counts are reported."""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache, partial
from multiprocessing.sharedctypes import SynchronizedArray
from typing import Any, Self, TypeVar

from paco_ds.data.pack.progress_bar import ShardProgress, peak_of_process
from paco_ds.errors import DataError

Settings = TypeVar("Settings")
Job = TypeVar("Job")
Result = TypeVar("Result")
Report = Callable[[int, int, int], None]  # images, bytes and bad images since the last report
_LOOK_EVERY = 0.5  # seconds
_AHEAD = 2  # jobs queued per process, so that none waits


class Workers:
    """`count` worker processes; with a count of 1 this process does the work. A context manager: the processes start at
    once and end with the block.

    Args:
        modules: imported by the fork server first.
    """

    def __init__(self, count: int, *modules: str) -> None:
        self.count = count
        if count > 1:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__, *modules])
            # the three counts of a report, and the peak memory of a process
            self._counts: SynchronizedArray[int] = context.Array("q", 4)
            self._pool = ProcessPoolExecutor(count, context, _begin, (self._counts,))
            for _ in range(count):  # the pool starts a process only for a job that no idle process takes
                self._pool.submit(int)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.count > 1:
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Job], Result], items: Iterable[Job]) -> Iterator[Result]:
        """As `map`, for a picklable function and items; a few run at a time."""
        if self.count <= 1:
            yield from map(function, items)
            return
        waiting = iter(items)
        running = deque(self._submitted(self.count * _AHEAD, waiting, function))
        while running:
            with _end_named():
                result = running.popleft().result()
            running.extend(self._submitted(1, waiting, function))
            yield result

    def run(
        self,
        function: Callable[[Settings, Job, Report], Result],
        settings: Settings,
        jobs: Iterable[Job],
        progress: ShardProgress,
    ) -> Iterator[Result]:
        """Yield results as jobs finish; an error of a job is raised here.

        Args:
            function: a module-level function, `function(settings, job, report)`.
            settings: unpickled once in each process.
            jobs: consumed one by one, so that only running ones exist.
        """
        if self.count <= 1:
            for job in jobs:
                yield function(settings, job, progress.add)
            return
        packed = pickle.dumps(settings, pickle.HIGHEST_PROTOCOL)
        waiting = iter(jobs)
        call = partial(_call, function, packed)
        running, seen = set(self._submitted(self.count * _AHEAD, waiting, call)), [0, 0, 0]
        try:
            while running:
                done, running = wait(running, _LOOK_EVERY, FIRST_COMPLETED)
                with self._counts.get_lock():
                    *now, peak = (self._counts[place] for place in range(len(self._counts)))
                progress.note_peak(peak)
                progress.add(*(new - old for new, old in zip(now, seen, strict=True)))
                seen = now
                for future in done:
                    with _end_named():
                        result = future.result()
                    yield result
                running.update(self._submitted(len(done), waiting, call))
        finally:
            for future in running:
                future.cancel()
            wait(running)

    def _submitted(
        self, number: int, waiting: Iterator[Job], function: Callable[[Job], Result]
    ) -> Iterator[Future[Result]]:
        """Submit the next `number` items."""
        for item in itertools.islice(waiting, number):
            with _end_named():
                future = self._pool.submit(function, item)
            yield future


_counts_here: SynchronizedArray[int] | None = None


@contextmanager
def _end_named() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, perhaps out of memory: give the same command again, in that case with fewer "
            "--workers; finished shards are kept"
        ) from error


def _begin(counts: SynchronizedArray[int]) -> None:
    # the parent handles an interrupt; workers finish their shard
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    global _counts_here
    _counts_here = counts


@lru_cache(maxsize=1)
def _unpacked(settings: bytes) -> Any:
    return pickle.loads(settings)


def _call(function: Any, settings: bytes, job: Any) -> Any:
    counts = _counts_here
    assert counts is not None

    def report(images: int, size: int, bad: int) -> None:
        with counts.get_lock():
            for place, more in enumerate((images, size, bad)):
                counts[place] += more

    result = function(_unpacked(settings), job, report)
    with counts.get_lock():
        counts[3] = max(counts[3], peak_of_process())
    return result

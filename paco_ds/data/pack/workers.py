"""Owns the processes that work on shards: jobs made one at a time, settings sent once, counts reported as they grow."""

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

from paco_ds.data.pack.progress import ShardProgress, peak_of_process
from paco_ds.errors import DataError

Settings = TypeVar("Settings")
Job = TypeVar("Job")
Result = TypeVar("Result")
Report = Callable[[int, int, int], None]  # images, bytes and bad images since the last one
_LOOK_EVERY = 0.5  # seconds
_AHEAD = 2  # jobs made per process before one is free, so that none waits


class Workers:
    """So many processes, or none where one is asked for and this one does the work. They start at once, while this
    one has other things to do, and end with the block that this is the context of.

    Args:
        modules: what the process that they are forked from imports first.
    """

    def __init__(self, count: int, *modules: str) -> None:
        self.count = count
        if count > 1:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__, *modules])
            # A report's three, and the most memory of a process.
            self._counts: SynchronizedArray[int] = context.Array("q", 4)
            self._pool = ProcessPoolExecutor(count, context, _begin, (self._counts,))
            for _ in range(count):  # a process is started when there is more to do than there are processes
                self._pool.submit(int)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.count > 1:
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Job], Result], items: Iterable[Job]) -> Iterator[Result]:
        """As Python's, of a function and items that can be sent to processes; a few are under way at a time."""
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
        """Results as they come; an error of a job is raised here.

        Args:
            function: at the top of a module; `function(settings, job, report)`.
            settings: each process unpacks them once.
            jobs: taken one by one, so that only those under way exist.
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
        """Hand on so many of what waits."""
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
            "a worker process was ended from outside, perhaps because memory was short: give the same command again, "
            "with fewer --workers in that case; what is finished is kept"
        ) from error


def _begin(counts: SynchronizedArray[int]) -> None:
    # An interrupt is the parent's to answer: these finish the shard they have.
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

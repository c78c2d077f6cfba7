"""Owns the processes that work on shards: jobs made one at a time, settings sent once, counts reported as they grow."""

from __future__ import annotations

import itertools
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver
from multiprocessing.sharedctypes import SynchronizedArray
from typing import Any, TypeVar

from paco_ds.data.progress import ShardProgress, peak_of_process
from paco_ds.errors import DataError

Settings = TypeVar("Settings")
Job = TypeVar("Job")
Result = TypeVar("Result")
Report = Callable[[int, int, int], None]  # images, bytes and bad images since the last one
_LOOK_EVERY = 0.5  # seconds
_AHEAD = 2  # jobs made per process before one is free, so that none waits

_here: tuple[Any, ...] = ()


def warm_up(*modules: str) -> None:
    """Let the process that workers are forked from start and import, while this one has other things to do."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__, *modules])
    forkserver.ensure_running()


def run_jobs(
    function: Callable[[Settings, Job, Report], Result],
    settings: Settings,
    jobs: Iterable[Job],
    workers: int,
    progress: ShardProgress,
) -> Iterator[Result]:
    """Results as they come, from this process or so many others; an error of a job is raised here.

    Args:
        function: at the top of a module; `function(settings, job, report)`.
        jobs: taken one by one, so that only those under way exist.
    """
    if workers <= 1:
        for job in jobs:
            yield function(settings, job, progress.add)
        return
    context = multiprocessing.get_context("forkserver")
    counts: SynchronizedArray[int] = context.Array("q", 4)  # a report's three, and the most memory of a process
    seen = [0, 0, 0]
    with ProcessPoolExecutor(workers, context, _begin, (function, settings, counts)) as pool:
        waiting = iter(jobs)
        running: set[Future[Result]] = {pool.submit(_call, job) for job in itertools.islice(waiting, workers * _AHEAD)}
        try:
            while running:
                done, running = wait(running, _LOOK_EVERY, FIRST_COMPLETED)
                with counts.get_lock():
                    *now, peak = (counts[place] for place in range(len(counts)))
                progress.note_peak(peak)
                progress.add(*(new - old for new, old in zip(now, seen, strict=True)))
                seen = now
                for future in done:
                    yield _result(future)
                running |= {pool.submit(_call, job) for job in itertools.islice(waiting, len(done))}
        finally:
            pool.shutdown(cancel_futures=True)


def _result(future: Future[Result]) -> Result:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was ended from outside, perhaps because memory was short: give the same command again, "
            "with fewer --workers in that case; what is finished is kept"
        ) from error


def _begin(function: Any, settings: Any, counts: SynchronizedArray[int]) -> None:
    # An interrupt is the parent's to answer: these finish the shard they have.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def report(images: int, size: int, bad: int) -> None:
        with counts.get_lock():
            for place, more in enumerate((images, size, bad)):
                counts[place] += more

    def note_peak() -> None:
        with counts.get_lock():
            counts[3] = max(counts[3], peak_of_process())

    global _here
    _here = function, settings, report, note_peak


def _call(job: Any) -> Any:
    function, settings, report, note_peak = _here
    result = function(settings, job, report)
    note_peak()
    return result

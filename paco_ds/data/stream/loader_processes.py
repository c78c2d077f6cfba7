"""The loader processes of a rank: how they start, end with it, and tell what went wrong."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess

import cv2
import torch
import webdataset as wds
from torch.utils.data import DataLoader

from paco_ds.data.stream.load import Part
from paco_ds.errors import TrainingError, UserError

_NEWS = 20.0  # seconds within which the end of a loader process is known


def start_loading(pipeline: wds.DataPipeline, workers: int, ahead: int = 2) -> Iterator[Part]:
    """Start the loader's processes, now, and iterate over what they make; a user's error arrives as it was raised.

    Args:
        ahead: parts that each process makes before they are asked for.
    """
    if workers:
        # fork would copy a process that already runs threads; a fork server has none
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["paco_ds.data.stream.batches"])  # or every worker would import torch by itself
    loader = DataLoader(
        wds.DataPipeline(pipeline, _errors_as_values),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=ahead if workers else None,
        multiprocessing_context=context if workers else None,
        worker_init_fn=functools.partial(_begin_worker, environment=dict(os.environ)),
    )
    with _signals_blocked():
        parts = iter(loader)
    processes = list(getattr(parts, "_workers", ()))
    # Python would end them at exit by SIGTERM, which they do not see, and wait for ever. What is registered last
    # runs first.
    end = functools.partial(_kill, processes)
    atexit.register(end)
    return _raising(parts, processes, end)


def _errors_as_values(parts: Iterable[Part]) -> Iterator[Part | UserError]:
    """A loader process would wrap an error's message in its traceback."""
    try:
        yield from parts
    except UserError as error:
        yield error


def _raising(
    parts: Iterator[Part | UserError], processes: list[BaseProcess], end: Callable[[], None]
) -> Iterator[Part]:
    try:
        for part in parts:
            if isinstance(part, UserError):
                raise part
            yield part
    except (RuntimeError, OSError, EOFError) as error:
        # A connection that breaks is known before the end of the process that broke it.
        connection.wait([process.sentinel for process in processes], timeout=_NEWS)
        gone = [f"{process.pid} ({process.exitcode})" for process in processes if process.exitcode]
        if not gone:
            raise
        raise TrainingError(
            f"loader process {', '.join(gone)} (exit status) of this rank is gone. -9 is mostly the kernel's, out of "
            f"memory: lower data.workers or data.window, or give the host more; then run the same command to go on"
        ) from error
    finally:
        end()
        atexit.unregister(end)


def _kill(processes: list[BaseProcess]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()


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


def _begin_worker(worker: int, environment: dict[str, str]) -> None:
    """The rank's environment, where storage finds its keys: the fork server's may be older. One thread for the images,
    and one that ends this process when its rank is gone, however that went.

    torch's loader looks for another parent instead, but the fork server stays: it waits for its workers. Workers
    left over hold on to the rank's output, and so ssh and the launcher of other hosts wait for them.
    """
    os.environ.update(environment)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_the_rank, daemon=True).start()


def _end_with_the_rank() -> None:
    rank = multiprocessing.parent_process()
    if rank is not None:
        rank.join()  # not a child of ours: this waits for the pipe that only it holds open
        os._exit(1)

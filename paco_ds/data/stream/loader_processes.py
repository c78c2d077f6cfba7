"""The loader processes of a rank: start, errors, and end together with the rank."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path

import cv2
import psutil
import torch
import webdataset as wds
from torch.utils.data import DataLoader

from paco_ds.data.stream.load import Part
from paco_ds.errors import LostProcessError, UserError

_NEWS = 20.0  # seconds to wait for the exit status of a loader process


def start_loading(pipeline: wds.DataPipeline, workers: int, ahead: int = 2) -> Iterator[Part]:
    """Start the loader processes and iterate over their parts; a UserError raised in one is raised here unchanged.

    Args:
        ahead: parts that each process prefetches.
    """
    if workers:
        # a process that runs threads must not be forked; the fork server has none
        context = multiprocessing.get_context("forkserver")
        name_semaphores()
        context.set_forkserver_preload(["paco_ds.data.stream.batches"])  # or every worker would import torch
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
    # At exit Python would send SIGTERM, which they have blocked, and wait for ever. Last registered runs first.
    end = functools.partial(_kill, processes)
    atexit.register(end)
    return _raising(parts, processes, end)


def name_semaphores(folder: Path = Path("/dev/shm")) -> None:
    """Name this process in its semaphores, and remove those of dead ones.

    The resource tracker removes them after any death of the rank, unless it was killed too, as by a scheduler that
    kills all processes of a job.
    """
    mark = f"paco-{os.stat('/proc/self/ns/pid').st_ino}"  # processes of another container have numbers of their own
    multiprocessing.current_process()._config["semprefix"] = f"/{mark}-{os.getpid()}"  # type: ignore[attr-defined]
    for path in folder.glob(f"sem.{mark}-*"):
        with suppress(OSError, ValueError):  # another rank was faster, or it is another user's
            if not psutil.pid_exists(int(path.name.split("-")[2])):
                path.unlink()


def _errors_as_values(parts: Iterable[Part]) -> Iterator[Part | UserError]:
    """Yield a UserError as a value: a loader process would wrap its message in a traceback."""
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
        # the broken connection is noticed before the exit of the process that broke it
        if processes:  # without any it would sleep for as long
            connection.wait([process.sentinel for process in processes], timeout=_NEWS)
        gone = [f"{process.pid} ({process.exitcode})" for process in processes if process.exitcode]
        if not gone:
            raise
        raise LostProcessError(
            f"loader process {', '.join(gone)} (exit status) of this rank died. -9 mostly means out of memory: "
            f"lower data.workers or data.window, or add memory; then run the same command to resume"
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
    """Processes started in the block ignore requests to stop: launchers and terminals send those to all processes of a
    rank, and the rank needs its images until the current step is done. They still end with the rank, even if it is
    killed (`_begin_worker`), and then the resource tracker removes the semaphores of its queues."""
    asking = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, asking)
    try:
        resource_tracker.ensure_running()  # its start unblocks SIGTERM and SIGINT, which it ignores
        signal.pthread_sigmask(signal.SIG_BLOCK, asking)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(worker: int, environment: dict[str, str]) -> None:
    """Take over the rank's environment, in which storage finds its credentials: the fork server's may be older. Use
    one thread for images, and one that ends this process when its rank ends in any way.

    torch's loader checks for a change of parent instead, but the parent is the fork server, which waits for its
    workers. Workers left over keep the rank's output open, so ssh and the launchers of other hosts would wait for them.
    """
    os.environ.update(environment)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_the_rank, daemon=True).start()


def _end_with_the_rank() -> None:
    rank = multiprocessing.parent_process()
    if rank is not None:
        rank.join()  # waits for the pipe that only the rank holds open
        os._exit(1)

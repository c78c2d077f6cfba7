"""Checkpoints are written by a thread beside training, in a run directory that this job alone holds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from paco_ds.checkpoint import recover
from paco_ds.distributed.folder_lock import FolderLock
from paco_ds.distributed.ranks import Ranks
from paco_ds.errors import UserError

logger = logging.getLogger(__name__)


class Saver:
    """Runs one write at a time in a thread. What it raises is raised again by the next `submit` or `wait`."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._under_way: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Begin a write; one that is under way is waited for first."""
        self.wait()
        self._under_way = self._thread.submit(write)

    @property
    def failed(self) -> bool:
        """Whether the last write has ended with an error that nobody was told yet."""
        return self._under_way is not None and self._under_way.done() and self._under_way.exception() is not None

    def wait(self) -> None:
        """Wait for the write under way."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def close(self) -> None:
        """Wait for the write under way and end the thread. An error that nobody was told is logged."""
        try:
            self.wait()
        except UserError as error:
            logger.error("%s", error)
        self._thread.shutdown()


@contextmanager
def sole_writer(run: Path, ranks: Ranks) -> Iterator[FolderLock | None]:
    """Hold a run directory during the block, and first remove what a killed run left there.

    Returns:
        its lock on the first rank, None on the others.

    Raises:
        UserError: on every rank, if another job holds it or it cannot be written.
    """
    lock, failure = FolderLock(run, "trained") if ranks.first else None, None
    if lock is not None:
        try:
            lock.acquire()
            recover(run)
        except UserError as error:
            failure = error
    if failure := ranks.gather_objects(failure)[0]:
        raise failure
    try:
        yield lock
    finally:
        if lock is not None:
            lock.release()

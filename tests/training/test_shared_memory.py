"""Ranks of one host average through memory that they share, and none of them hangs or leaves anything behind.

Threads stand in for ranks here; tests/distributed/test_gradients.py has real ones.
"""

import errno
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from paco_ds.distributed.ranks import Ranks
from paco_ds.training import shared_memory
from paco_ds.training.gradients import GradientMean
from paco_ds.training.shared_memory import NoSharedMemoryError, SharedMemoryMean, resident_bytes, shared_bytes


class ThreadRanks(Ranks):
    """A rank that is a thread; only objects are gathered."""

    meeting: threading.Barrier
    board: list[Any]

    def gather_objects(self, value: Any) -> list[Any]:
        self.board[self.rank] = value
        self.meeting.wait(10)
        found = list(self.board)
        self.meeting.wait(10)
        return found


def on_ranks(world_size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What each rank's work returns or raises."""
    meeting, board = threading.Barrier(world_size), [None] * world_size

    def run(rank: int) -> Any:
        ranks = ThreadRanks(rank, world_size, rank, torch.device("cpu"))
        ranks.meeting, ranks.board = meeting, board
        try:
            return work(ranks)
        except Exception as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(shared_memory, "CHUNK", 8)


@pytest.fixture
def folder(monkeypatch):
    """Where temporary files are made; a short path, as addresses of sockets are."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("lengths", [(), (1,), (8,), (0, 3), (5, 3, 8), (7, 30, 2, 9)])
def test_tensors_become_their_mean_wherever_chunks_end(small_chunks, world_size, lengths):
    """Ranks that are late at random; three calls in a row through the same buffers."""

    def work(ranks):
        mean = SharedMemoryMean(ranks, timeout=10)
        meet, late = mean._meet, random.Random(ranks.rank)

        def meet_late(numbers: int) -> None:
            time.sleep(late.choice([0, 0, 0.001]))
            meet(numbers)

        mean._meet = meet_late
        for call in range(3):
            tensors = [torch.arange(n, dtype=torch.float32) * (ranks.rank + 1) + call for n in lengths]
            mean(tensors)
            factor = (world_size + 1) / 2
            for n, tensor in zip(lengths, tensors, strict=True):
                torch.testing.assert_close(tensor, torch.arange(n, dtype=torch.float32) * factor + call)
        return "done"

    assert on_ranks(world_size, work) == ["done"] * world_size


def test_nothing_is_left_behind_once_all_have_opened_it(folder):
    assert all(isinstance(mean, SharedMemoryMean) for mean in on_ranks(2, lambda ranks: SharedMemoryMean(ranks, 10)))
    assert not list(folder.iterdir())


def test_memory_that_cannot_be_had_is_said_and_sockets_are_used(folder, monkeypatch, caplog):
    def full(file: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setenv("LOCAL_SIZE", "2")
    assert [mean.shared for mean in on_ranks(2, lambda ranks: GradientMean(ranks, 10))] == [None, None]
    assert caplog.messages == [
        "ranks cannot share memory (rank 0: [Errno 28] No space left on device; 12 MiB are needed, and a folder for "
        "temporary files that all see): gradients go through sockets, which takes longer"
    ]
    assert not list(folder.iterdir())


NO_FILES = OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.parametrize("step", ["_connect", "_take"])
def test_all_ranks_do_without_memory_that_one_cannot_have(folder, monkeypatch, step):
    """As where rank 1 sees another /tmp, in a container of its own."""
    works = getattr(SharedMemoryMean, step)

    def fails(self: SharedMemoryMean, given: Any) -> Any:
        if self._rank == 1:
            raise NO_FILES
        return works(self, given)

    monkeypatch.setattr(SharedMemoryMean, step, fails)
    check_refused(folder, "rank 1: [Errno 24] Too many open files")


@pytest.mark.parametrize("step", ["send_fds", "mmap"])
def test_all_ranks_do_without_memory_that_rank_0_cannot_give(folder, monkeypatch, step):
    def fails(*arguments: Any) -> None:
        raise NO_FILES

    monkeypatch.setattr(shared_memory.socket if step == "send_fds" else shared_memory.mmap, step, fails)
    check_refused(folder, "rank 0: [Errno 24] Too many open files")


def check_refused(folder: Path, reason: str) -> None:
    """By all ranks, long before the time is over."""
    began = time.monotonic()
    errors = on_ranks(3, lambda ranks: SharedMemoryMean(ranks, 30))
    assert time.monotonic() - began < 10
    assert {type(error) for error in errors} == {NoSharedMemoryError}
    assert {str(error) for error in errors} == {reason}
    assert not list(folder.iterdir())


def test_ranks_of_several_hosts_do_not_look_for_it(monkeypatch):
    monkeypatch.setenv("LOCAL_SIZE", "1")
    assert [mean.shared for mean in on_ranks(2, lambda ranks: GradientMean(ranks, 10))] == [None, None]


@pytest.mark.parametrize("ended", [0, 1])
def test_a_rank_that_ended_ends_the_wait_of_the_others(small_chunks, ended):
    def work(ranks):
        mean = SharedMemoryMean(ranks, timeout=30)
        mean([torch.ones(20)])
        if ranks.rank == ended:
            mean.close()  # as the kernel does for a process that died
        else:
            mean([torch.ones(20)])

    errors = on_ranks(2, work)
    assert errors[ended] is None
    error = errors[1 - ended]
    assert isinstance(error, ConnectionError)
    assert str(error) == f"rank {ended} ended, or gave up, while rank {1 - ended} averaged gradients with it"


def test_a_rank_that_does_not_come_is_not_waited_for_without_end():
    """Nor does what it left unfinished become part of a later call."""

    def work(ranks):
        mean = SharedMemoryMean(ranks, timeout=0.2)
        if ranks.rank == 0:
            with pytest.raises(TimeoutError, match=r"rank 0 waited 0.2 s .* with rank 1, which did not come"):
                mean([torch.ones(20)])
        ranks.gather_objects(None)
        with pytest.raises(ConnectionError):
            mean([torch.ones(20)])
        return "done"

    assert on_ranks(2, work) == ["done", "done"]


def test_ranks_that_have_other_gradients_are_told(small_chunks):
    """Their numbers would be averaged with those of another parameter."""
    first, *others = on_ranks(3, lambda ranks: SharedMemoryMean(ranks, 10)([torch.ones(20 + (ranks.rank == 2))]))
    assert isinstance(first, ValueError)
    assert str(first) == (
        "rank 2 has 21 numbers to average and rank 0 20: a parameter has a gradient on some ranks only"
    )
    assert {type(error) for error in others} == {ConnectionError}


def test_numbers_of_another_precision_are_refused():
    first, _ = on_ranks(2, lambda ranks: SharedMemoryMean(ranks, 10)([torch.ones(3, dtype=torch.float64)]))
    assert isinstance(first, ValueError)
    assert "float64" in str(first)


def test_the_resident_share_is_less_than_the_memory():
    """Of two ranks 10 of 12 MiB; a small mean touches little of it."""
    assert (shared_bytes(2), resident_bytes(2, 10**9)) == (12 * 2**20, 10 * 2**20)
    assert resident_bytes(64, 10**9) < 12 * 2**20
    assert (resident_bytes(2, 1000), resident_bytes(1, 10**9)) == (10_000, 0)

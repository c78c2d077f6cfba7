"""Ranks of one host average through memory that they share, and none of them hangs or leaves anything behind.

Threads stand in for ranks here; tests/distributed/test_gradients.py has real ones.
"""

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from paco_ds import shared_memory
from paco_ds.distributed import Ranks
from paco_ds.gradients import GradientMean
from paco_ds.shared_memory import SharedMemoryMean, shared_bytes


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
def folder(monkeypatch, tmp_path):
    """Where the memory is made, in place of /dev/shm."""
    monkeypatch.setattr(shared_memory, "_FOLDER", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("lengths", [(), (1,), (8,), (0, 3), (5, 3, 8), (7, 30, 2, 9)])
def test_tensors_become_their_mean_wherever_chunks_end(small_chunks, folder, world_size, lengths):
    def work(ranks):
        mean = SharedMemoryMean(ranks, timeout=10)
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


def test_the_memory_is_as_large_as_planned(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "posix_fallocate", lambda file, start, size: seen.append(size) or os.truncate(file, size))
    on_ranks(2, lambda ranks: SharedMemoryMean(ranks, 10))
    assert seen == [shared_bytes(2)]


def test_a_full_shared_memory_is_said_and_sockets_are_used(folder, monkeypatch, caplog):
    def full(file: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setenv("LOCAL_SIZE", "2")
    assert [mean.shared for mean in on_ranks(2, lambda ranks: GradientMean(ranks, 10))] == [None, None]
    assert caplog.messages == [
        "no shared memory ([Errno 28] No space left on device): gradients go through sockets, which takes longer"
    ]
    assert not list(folder.iterdir())


def test_all_ranks_refuse_memory_that_one_cannot_open(folder, monkeypatch):
    """As ranks in containers of their own."""
    opened = SharedMemoryMean._open

    def another_folder(self: SharedMemoryMean, folder: Path) -> OSError | None:
        return opened(self, folder / "elsewhere" if self._rank == 1 else folder)

    monkeypatch.setattr(SharedMemoryMean, "_open", another_folder)
    errors = on_ranks(3, lambda ranks: SharedMemoryMean(ranks, 10))
    assert all(isinstance(error, FileNotFoundError) for error in errors)
    assert not list(folder.iterdir())


def test_ranks_of_several_hosts_do_not_look_for_it(folder, monkeypatch):
    monkeypatch.setenv("LOCAL_SIZE", "1")
    assert [mean.shared for mean in on_ranks(2, lambda ranks: GradientMean(ranks, 10))] == [None, None]


@pytest.mark.parametrize("ended", [0, 1])
def test_a_rank_that_ended_ends_the_wait_of_the_others(small_chunks, folder, ended):
    def work(ranks):
        mean = SharedMemoryMean(ranks, timeout=30)
        mean([torch.ones(20)])
        if ranks.rank == ended:
            for link in mean._links:
                link.close()  # as the kernel does for a process that died
        else:
            mean([torch.ones(20)])

    errors = [error for error in on_ranks(2, work) if error is not None]
    assert [isinstance(error, ConnectionError) for error in errors] == [True]


def test_a_rank_that_does_not_come_is_not_waited_for_without_end(folder):
    def work(ranks):
        mean = SharedMemoryMean(ranks, timeout=0.2)
        if ranks.rank == 0:
            mean([torch.ones(20)])
        return mean  # alive until the other has given up

    error, _ = on_ranks(2, work)
    assert isinstance(error, TimeoutError)
    assert str(error) == "rank 0 waited 0.2 s to average gradients with a rank that did not come"

"""Persistent pools of real gloo ranks: a distributed test costs its own work, not a start-up.

Functions are named, not sent: a rank imports `module:function` and calls it with keyword arguments. A rank that
raises, dies or hangs fails the test with what it said, and the pool is replaced.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import socket
import time
import traceback
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any


class RankError(AssertionError):
    """One or more ranks raised, died or hung."""


def start_fork_server() -> None:
    """Start what ranks are forked from: a server that has imported all they need, or half of a short test is imports.

    A process has one such server. Called first, it is this one, and not one that a build of shards starts.
    """
    multiprocessing.set_forkserver_preload(
        ["paco_ds.training.trainer", "paco_ds.report", "tests.distributed.training", "torch._dynamo"]
    )
    forkserver.ensure_running()


class RankPool:
    """W processes joined in one group through DeepSpeed, as a launcher would start them; gloo unless `cuda`."""

    def __init__(self, world_size: int, cuda: bool = False) -> None:
        self.world_size = world_size
        context = multiprocessing.get_context("forkserver")
        port = _free_port()
        self._ranks = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, world_size, port, cuda), daemon=False)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def run(self, function: str, timeout: float = 1200, **arguments: Any) -> list[Any]:
        """Call `module:function(ranks, **arguments)` on every rank; their results in rank order."""
        for _, pipe in self._ranks:
            pipe.send((function, arguments))
        deadline = time.monotonic() + timeout
        results, problems = [], []
        for rank, (process, pipe) in enumerate(self._ranks):
            outcome = _receive(process, pipe, deadline)
            if outcome[0] == "ok":
                results.append(outcome[1])
            else:
                problems.append(f"rank {rank} of {self.world_size} {outcome[0]}: {outcome[1]}")
                deadline = min(deadline, time.monotonic() + 10)  # the others may wait for it for ever
        if problems:
            self.close()
            raise RankError("\n".join(problems))
        return results

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process, _ in self._ranks)

    def close(self) -> None:
        for _, pipe in self._ranks:
            pipe.close()
        deadline = time.monotonic() + 5
        for process, _ in self._ranks:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()


def _receive(process: Any, pipe: Connection, deadline: float) -> tuple[str, Any]:
    while time.monotonic() < deadline:
        if pipe.poll(0.05):
            try:
                outcome: tuple[str, Any] = pipe.recv()
            except EOFError:
                return "died", f"exit code {process.exitcode}"
            return outcome
        if not process.is_alive():
            return "died", f"exit code {process.exitcode}"
    return "hung", "no answer in time"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve(pipe: Connection, rank: int, world_size: int, port: int, cuda: bool) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    gc.freeze()  # what the fork server imported is no garbage: DeepSpeed collects at every start of stage 3
    if not cuda:  # ranks of one test share a machine, but cannot share its GPU
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from paco_ds.distributed.launch import leave_job
    from paco_ds.training import engine
    from tests.recipes import tiny_recipe

    micro_batches = f"step.micro_batches={12 if 12 % world_size == 0 else world_size}"
    ranks = engine.start(tiny_recipe(micro_batches).step, threads=1)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            break
        module, name = function.split(":")
        try:
            outcome = ("ok", getattr(importlib.import_module(module), name)(ranks, **arguments))
        except BaseException:
            outcome = ("raised", traceback.format_exc())
        pipe.send(outcome)
    leave_job()

"""The rank processes of a bench: joined in one gloo group, alive between calls, and the clock of their parts."""

import importlib
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import wraps
from multiprocessing.connection import Connection
from typing import Any

from paco_ds.distributed.launch import free_port

PRELOAD = ["paco_ds.training.trainer"]  # imported once, by the fork server; a process then starts in half a second


class Parts:
    """Wall seconds by part of a step. A part that runs inside another counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._settle()
        self._running.append(name)
        try:
            yield
        finally:
            self._settle()
            self._running.pop()

    def time(self, owner: Any, attribute: str, name: str | Callable[..., str]) -> None:
        """Time an attribute of an object or a module from now on; the part's name may depend on the arguments."""
        function = getattr(owner, attribute)

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name if isinstance(name, str) else name(*args, **kwargs)):
                return function(*args, **kwargs)

        setattr(owner, attribute, timed)

    def take(self) -> dict[str, float]:
        """The seconds since the last call."""
        taken, self.seconds = self.seconds, {}
        return taken

    def _settle(self) -> None:
        now = time.perf_counter()
        if self._running:
            part = self._running[-1]
            self.seconds[part] = self.seconds.get(part, 0.0) + now - self._since
        self._since = now


class RankGroup:
    """`world_size` processes of one thread each that hold a worker and run its methods together.

    Args:
        worker: `module:class`, called in each process as `class(ranks, *arguments)`; modules beside the bench are
            found.
        arguments: picklable.

    Raises:
        RuntimeError: a rank raised, with its traceback, or died; the others are ended.
    """

    def __init__(self, world_size: int, worker: str, *arguments: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        os.environ["OMP_NUM_THREADS"] = "1"  # before the fork server imports torch
        port = free_port()
        self._ranks: list[tuple[Any, Connection]] = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            environment = _environment(rank, world_size, port)
            process = context.Process(target=_serve, args=(theirs, environment, worker, arguments))
            process.start()
            theirs.close()
            self._ranks.append((process, ours))
        self._answers("start")

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Run a method of the worker on every rank; what it returns, in rank order."""
        for _, pipe in self._ranks:
            pipe.send((method, arguments))
        return self._answers(method)

    def close(self) -> None:
        for _, pipe in self._ranks:
            pipe.close()
        for process, _ in self._ranks:
            process.join(20)
            if process.is_alive():
                process.kill()
                process.join()

    def _answers(self, what: str) -> list[Any]:
        answers: list[Any] = []
        problems: list[str] = []
        for rank, (_, pipe) in enumerate(self._ranks):
            if problems and not pipe.poll(10):  # it may wait for the one that failed
                continue
            try:
                raised, answer = pipe.recv()
            except EOFError:
                raised, answer = True, "died"
            (problems if raised else answers).append(f"rank {rank}: {answer}" if raised else answer)
        if problems:
            self.close()
            raise RuntimeError(f"{what}: " + "\n".join(problems))
        return answers


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `function(*arguments)`, of the top of a module, once on W fresh processes; results in rank order.

    Raises:
        BrokenProcessPool: a rank died. What a rank raises is raised here.
    """
    port = free_port()
    with ProcessPoolExecutor(world_size, mp_context=multiprocessing.get_context("spawn")) as pool:
        calls = [
            pool.submit(_call, _environment(rank, world_size, port), function, arguments) for rank in range(world_size)
        ]
        return [call.result() for call in calls]


def _call(environment: Mapping[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    os.environ |= environment
    return function(*arguments)


def _environment(rank: int, world_size: int, port: str) -> dict[str, str]:
    """What a launcher sets, for a job on this machine's CPU."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "CUDA_VISIBLE_DEVICES": "",
    }


def _serve(pipe: Connection, environment: Mapping[str, str], worker: str, arguments: tuple[Any, ...]) -> None:
    os.environ |= environment
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  the tables alone belong on the bench's output
    from paco_ds.distributed.launch import join_job, leave_job
    from paco_ds.training import engine

    try:
        ranks = join_job(1, engine.init_distributed)
        module, name = worker.split(":")
        held = getattr(importlib.import_module(module), name)(ranks, *arguments)
        pipe.send((False, None))
        while True:
            method, given = pipe.recv()
            pipe.send((False, getattr(held, method)(*given)))
    except EOFError:
        leave_job()
    except BaseException:
        pipe.send((True, traceback.format_exc()))

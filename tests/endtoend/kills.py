"""A job that is killed on purpose: who its processes are, and what they leave behind."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from paco_ds.checkpoint import newest_checkpoint
from paco_ds.metrics.log import read
from tests.multinode.hosts import Job
from tests.recipes import write_tiny_recipe

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "paco_ds" / "train.py"
DEEPSPEED = Path(sys.executable).with_name("deepspeed")
SHARED_MEMORY = Path("/dev/shm")


class KilledJob:
    """A command of a training, whose processes are killed.

    Args:
        words: the command.
        run: its run directory.
    """

    def __init__(self, words: Sequence[object], run: Path) -> None:
        self.run = run
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        self.job = Job([sys.executable, *words], run.parent, {**environment, "OMP_NUM_THREADS": "1"})
        self._seen: set[psutil.Process] = set()

    def processes(self, kind: str) -> list[psutil.Process]:
        """Living processes of a kind: rank, loader (and its fork server), launcher, deepspeed, keeper."""
        own = psutil.Process(self.job.process.pid)
        found = [own, *own.children(recursive=True)]
        self._seen.update(found)
        return [process for process in found if _kind(process) == kind]

    def kill(self, kind: str, draw: random.Random, number: int = signal.SIGKILL) -> bool:
        """Send a signal to one of a kind, drawn; False if there is none just now."""
        found = sorted(self.processes(kind), key=lambda process: process.pid)
        for process in [draw.choice(found)] if found else []:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        return bool(found)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 600) -> None:
        self.job.wait_until(condition, seconds)

    def wait(self, seconds: float = 600) -> int:
        """Exit status; fail if a process, a semaphore, shared memory or an unfinished file is left."""
        deadline = time.monotonic() + seconds
        while self.job.process.poll() is None and time.monotonic() < deadline:
            self.processes("rank")  # those of later starts are to be gone too
            time.sleep(0.2)
        status = self.job.wait(1)
        assert psutil.wait_procs(self._seen, timeout=120)[1] == []
        own = {str(process.pid) for process in self._seen}  # semaphores and tensors have it in their names
        deadline = time.monotonic() + 30  # what a dead process held, its resource tracker removes
        while left := [name for name in os.listdir(SHARED_MEMORY) if own & set(re.findall(r"\d+", name))]:
            assert time.monotonic() < deadline, f"left in {SHARED_MEMORY}: {left}"
            time.sleep(0.1)
        return status

    def unfinished(self) -> list[Path]:
        """Files and folders under the run that were not finished."""
        return [path for path in self.run.rglob("*") if path.suffix in (".part", ".partial")]

    @property
    def step(self) -> int:
        """The last step in the log, 0 before the first."""
        log = self.run / "metrics.jsonl"
        steps = [line["step"] for line in read(log) if line["kind"] == "step"] if log.exists() else []
        return steps[-1] if steps else 0


def write_recipe(folder: Path, shards: Path, epochs: int, evaluate_every: int = 0) -> Path:
    """A recipe of epochs of 4 steps that saves every 5 steps, and evaluates at the end or every few epochs."""
    path = folder / "tiny.yaml"
    (folder / "zero1.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    evaluation = f"evaluation.every_epochs={evaluate_every}"
    settings = ("engine.deepspeed=zero1.json", f"schedule.epochs={epochs}", evaluation)
    write_tiny_recipe(path, f"data.shards={shards}", "checkpoint.every_steps=5", *settings)
    return path


def deepspeed(port: int, *arguments: object) -> list[object]:
    """`deepspeed` on two ranks of this host, started again by `paco-keep-running`."""
    launch = ("--num_gpus", 2, "--master_port", port, TRAIN)
    return [ROOT / "tools" / "keep_running.py", "--restarts", 30, "--", DEEPSPEED, *launch, *arguments]


def learnt(run: Path) -> tuple[list[tuple[float, ...]], dict[str, list[float]]]:
    """What must be bit-equal: every logged step, and the weights, momentum and queue of the newest checkpoint."""
    fields = ("step", "epoch", "loss", "lr", "grad_norm")
    steps = [tuple(line[f] for f in fields) for line in read(run / "metrics.jsonl") if line["kind"] == "step"]
    checkpoint = newest_checkpoint(run)
    tensors = {**checkpoint.model(), **checkpoint.optimizer(), **checkpoint.queue()}
    return steps, {name: value.flatten().tolist() for name, value in tensors.items()}


def _kind(process: psutil.Process) -> str:
    try:
        words = process.cmdline()
        if "deepspeed.launcher.launch" in words:
            return "launcher"
        if str(DEEPSPEED) in words[:3]:
            return "deepspeed"
        if any("multiprocessing.forkserver" in word for word in words):
            return "loader"
        if str(TRAIN) in words[:3]:
            return "rank" if "RANK" in process.environ() else "keeper"
    except psutil.Error:
        pass
    return "other"

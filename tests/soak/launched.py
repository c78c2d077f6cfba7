"""A small training under `deepspeed`, to be disturbed while it runs."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.multinode.hosts import free_port
from tests.multinode.training import TRAIN, write_recipe

DEEPSPEED = Path(sys.executable).with_name("deepspeed")


class Launched:
    """`deepspeed` with two ranks on this host."""

    def __init__(self, folder: Path, shards: Path, *overrides: str, stage: int = 1) -> None:
        self.run = folder / "run"
        config = write_recipe(folder, shards, epochs=2000, stage=stage)
        self.metrics_port = free_port()  # of rank 0; the other has the next
        command = [DEEPSPEED, "--num_gpus", 2, "--master_port", free_port(), TRAIN, "--config", config]
        command += ["--output", self.run, f"--set=metrics.port={self.metrics_port}"]
        command += [f"--set={override}" for override in overrides]
        self._output = folder / "output.txt"
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                [str(word) for word in command], cwd=folder, stdout=output, stderr=subprocess.STDOUT
            )

    @property
    def said(self) -> str:
        return self._output.read_text(errors="replace")

    def rank(self, rank: int) -> psutil.Process:
        """The process of a rank."""
        found = [
            process
            for process in psutil.Process(self.process.pid).children(recursive=True)
            if process.environ().get("RANK") == str(rank) and "forkserver" not in " ".join(process.cmdline())
        ]
        return min(found, key=lambda process: process.create_time())

    def family(self) -> list[psutil.Process]:
        """The launcher, the ranks and all of their processes."""
        launcher = psutil.Process(self.process.pid)
        return [launcher, *launcher.children(recursive=True)]

    def wait_until(self, condition: Callable[[], object], seconds: float = 400) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.01)

    def close(self) -> None:
        """End what is left."""
        if self.process.poll() is None:
            for process in self.family():
                process.kill()
            self.process.wait()

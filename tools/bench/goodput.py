"""How much of the time between two kills is training.

    python tools/bench/goodput.py [--minutes 60] [--every 10] [--ranks 2] [--output RUN] [--json]

The demo's recipe with epochs without end and a checkpoint every 40 steps, kept by `paco-train --restarts`. A rank,
drawn by a seed, is killed (SIGKILL) every few minutes. What a kill costs is the time until the step that was reached
before it is logged once more: noticing, the start, and the steps since the last checkpoint. The rest of the time until
the next kill is training.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

# The checkout need not be installed. This folder stays on the path, for the module that benches share.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from report import Bar, at_least, print_bars, print_table

from paco_ds.metrics.log import read

ROOT = Path(__file__).resolve().parents[2]
LEAST_TRAINING = 0.95
SETTINGS = (
    "schedule.epochs=100000",
    "checkpoint.every_steps=40",
    "evaluation.every_epochs=0",
    "metrics.log_every=1",
    "metrics.serve=false",
    "engine.threads=1",
)


@dataclass(frozen=True)
class Kill:
    """Seconds since a kill: until the first step of the new start, and until the steps of before are done again."""

    step: int
    first_step: float
    regained: float
    until_next: float

    @property
    def training(self) -> float:
        """Share of the time until the next kill."""
        return 1 - self.regained / self.until_next


def ranks_of(keeper: psutil.Process) -> list[psutil.Process]:
    """Processes that are ranks, not their loaders."""
    found = []
    for process in keeper.children():
        with suppress(psutil.Error):
            found += [process] if "RANK" in process.environ() else []
    return sorted(found, key=lambda process: process.pid)


def steps(run: Path) -> list[int]:
    log = run / "metrics.jsonl"
    return [line["step"] for line in read(log) if line["kind"] == "step"] if log.exists() else []


def starts(run: Path) -> int:
    return sum(line["kind"] == "start" for line in read(run / "metrics.jsonl"))


def _started(run: Path, before: int) -> bool:
    return starts(run) > before


def _stepped(run: Path, goal: int) -> bool:
    return steps(run)[-1] >= goal


def seconds_until(condition: Callable[[], object], keeper: psutil.Popen, began: float) -> float:
    while not condition():
        if keeper.poll() is not None:
            raise SystemExit(f"the training ended with {keeper.returncode} instead of going on")
        time.sleep(0.1)
    return time.monotonic() - began


def measure(run: Path, minutes: float, every: float, ranks: int) -> list[Kill]:
    """Train, kill and watch; the last kill has as much time after it as the others."""
    script = ROOT / "paco_ds" / "train.py"
    command = [sys.executable, script, "--config", "demo", "--ranks", ranks, "--restarts", 100, "--output", run]
    words = [str(word) for word in (*command, *(f"--set={setting}" for setting in SETTINGS))]
    draw = random.Random(1)
    kills: list[Kill] = []
    with (run.parent / "goodput.log").open("w") as said:
        keeper = psutil.Popen(words, stdout=said, stderr=subprocess.STDOUT)
    try:
        seconds_until(lambda: len(steps(run)) > 100, keeper, time.monotonic())
        for _ in range(max(1, round(minutes / every))):
            reached, started = steps(run)[-1], starts(run)
            draw.choice(ranks_of(keeper)).send_signal(signal.SIGKILL)
            began = time.monotonic()
            seconds_until(partial(_started, run, started), keeper, began)
            first = seconds_until(partial(_stepped, run, steps(run)[-1] + 1), keeper, began)
            regained = seconds_until(partial(_stepped, run, reached), keeper, began)
            time.sleep(max(0.0, began + 60 * every - time.monotonic()))
            kills.append(Kill(reached, first, regained, time.monotonic() - began))
    finally:
        keeper.terminate()  # ranks write a checkpoint
        keeper.wait()
    return kills


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and the bar."""
    parser = argparse.ArgumentParser(description="How much of the time between two kills is training.")
    parser.add_argument("--minutes", type=float, default=60, help="of the whole run (default %(default)s)")
    parser.add_argument("--every", type=float, default=10, help="minutes between kills (default %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="each should have a core (default %(default)s)")
    parser.add_argument("--output", type=Path, help="run directory, new (default: a temporary one)")
    parser.add_argument("--json", action="store_true", help="end with one JSON line per bar")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        run = arguments.output or Path(folder) / "run"
        run.parent.mkdir(parents=True, exist_ok=True)
        kills = measure(run.resolve(), arguments.minutes, arguments.every, arguments.ranks)
    print_table(
        f"A rank of {arguments.ranks} killed every {arguments.every:g} minutes: seconds after the kill",
        ["killed after step", "first step", "steps regained", "training until the next"],
        [[str(k.step), f"{k.first_step:.1f}", f"{k.regained:.1f}", f"{k.training:.1%}"] for k in kills],
    )
    seconds, lost = sum(k.until_next for k in kills), sum(k.regained for k in kills)
    share = 1 - lost / seconds
    bars: list[Bar] = [at_least("share of the time that is training", share, LEAST_TRAINING, ours=share)]
    print_bars(bars, as_json=arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

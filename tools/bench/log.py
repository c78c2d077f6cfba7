"""Bench of a long run's metrics.jsonl: its size, what a step pays for it, a resume's cut, and the report.

    python tools/bench/log.py [--steps N] [--log-every K] [--json]

The default is 400 epochs of iNaturalist 2018 in batches of 128: 1.37 million steps of PaCo, whose figures are drawn.
The report is the command `paco-report` in a process of its own, imports included; its memory is that process's peak.
Seconds are of a processor: nothing here waits but for the disk, and other work on the machine does not count.
"""

import argparse
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

# The checkout need not be installed. This folder stays on the path, for the module that benches share.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from report import at_most, print_bars, print_table

from paco_ds.config.recipe import MetricsSettings
from paco_ds.data.manifest import SHOTS
from paco_ds.evaluation.accuracy import ShotAccuracy
from paco_ds.metrics.log import MetricsLog
from paco_ds.metrics.steps import StepRecord

ROOT = Path(__file__).resolve().parents[2]
STEPS_PER_EPOCH, EPOCHS = 3_418, 400  # 437,513 images in batches of 128
MB = 10**6


def record(step: int, draw: random.Random) -> StepRecord:
    """A step's figures with all their digits."""

    def shots(scale: float) -> dict[str, float | None]:
        return {shot: scale * draw.uniform(0.1, 1) for shot in SHOTS}

    seconds = draw.uniform(0.1, 0.2)
    return StepRecord(
        step=step,
        epoch=(step - 1) // STEPS_PER_EPOCH,
        loss=draw.uniform(1, 9),
        lr=draw.uniform(0, 0.1),
        grad_norm=draw.uniform(0.5, 3),
        images_per_second=128 / seconds,
        data_wait_seconds=draw.uniform(0, 0.01),
        step_seconds=seconds,
        queue_fill=1.0,
        center_probability=shots(0.5),
        center_probability_optimum=shots(0.05),
        positive_probability=shots(0.1),
        positive_probability_optimum=shots(0.01),
        grad_norm_ratio=draw.uniform(0.5, 2),
    )


def write_log(path: Path, steps: int, every: int) -> float:
    """Log a run; returns the seconds that logging took of it."""
    draw, log = random.Random(1), MetricsLog(path, every=every, steps_per_epoch=STEPS_PER_EPOCH)
    records = [record(1, draw) for _ in range(1000)]
    accuracy = ShotAccuracy(0.7, 0.7, 0.7, 0.7, {"all": 0.9}, [])
    spent = 0.0
    for step in range(1, steps + 1):
        record_of_step = StepRecord(**{**vars(records[step % 1000]), "step": step, "epoch": step // STEPS_PER_EPOCH})
        began = time.process_time()
        log.step(record_of_step)
        spent += time.process_time() - began
        if step % STEPS_PER_EPOCH == 0:
            log.checkpoint(step, 0.1)
            log.evaluation(step, step // STEPS_PER_EPOCH, "val", accuracy)
    log.close()
    return spent


def cut(path: Path, step: int) -> float:
    """Seconds in which a resumed run cuts the log."""
    log = MetricsLog(path)
    began = time.process_time()
    log.cut_after(step)
    seconds = time.process_time() - began
    log.close()
    return seconds


def make_report(run: Path) -> tuple[float, int]:
    """Seconds of paco-report, and the bytes of its peak."""
    subprocess.run([sys.executable, "-m", "paco_ds.report.entry", run], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, and return the exit status: a bench reports, it does not judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS_PER_EPOCH * EPOCHS)
    parser.add_argument("--log-every", type=int, default=MetricsSettings().log_every)
    parser.add_argument("--json", action="store_true", help="end with one JSON line per bar")
    arguments = parser.parse_args(argv)
    steps = arguments.steps
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "metrics.jsonl"
        written = write_log(log, steps, arguments.log_every)
        size = log.stat().st_size
        report, peak = make_report(Path(folder))
        half = cut(log, steps // 2)
    rows = [
        ["log, MB", f"{size / MB:.1f}"],
        ["logging, microseconds a step", f"{1e6 * written / steps:.1f}"],
        ["report, s", f"{report:.1f}"],
        ["report, peak, MB", f"{peak / MB:.0f}"],
        ["a resume cuts half of it, s", f"{half:.2f}"],
    ]
    print_table(f"{steps:,} steps, a line for each {arguments.log_every}", ["what", ""], rows)
    of = f"{steps} steps"
    bars = [
        at_most(f"log of {of}, MB", size / MB, 100, ours=size / MB),
        at_most(f"report of {of}, s", report, 20, ours=report),
        at_most(f"report of {of}, peak, MB", peak / MB, 500, ours=peak / MB),
        at_most(f"resume, half of {of} cut, s", half, 5, ours=half),
    ]
    print_bars(bars, as_json=arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

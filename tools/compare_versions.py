#!/usr/bin/env python3
"""Proves that a change of the code changes no result: an older version and this checkout train the same recipes.

    python tools/compare_versions.py --old fa700ad                      a git revision (this one ends 0.8.0)
    python tools/compare_versions.py --old ../paco-0.8.0 --only paco ride --json
    python tools/compare_versions.py --old fa700ad --only paco --step-bench

Images of 12 x 12 pixels are drawn from a seed, and each version packs them. Then 2 CPU ranks train on them:

shards       every file of the shards folder is byte-equal
RECIPE       20 steps at ZeRO-1: all that metrics.jsonl says but wall times is bit-equal, the checkpoint's tensors
             byte-equal, its state.json equal but for `versions` and new settings that differences.py names
RECIPE       the older version's run, cut back to its checkpoint of step 10, is continued by the newer one: the same
             log and checkpoint again
stage N      3 steps of PaCo: losses within 1e-5, weights within 1e-3 of their update (tests/distributed/test_step.py)
--step-bench images/s beside the DDP loop at ZeRO-1, five rounds of each version in turn: the newer one's median is not
             below the older one's lowest round

Both versions are driven through their command lines alone, each in processes of its own that import its own package,
so any two versions can be compared. The exit status is 1 if anything differs. 30 trainings of some 35 CPU seconds each.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from differences import difference_of_checkpoints, difference_of_folders, difference_of_logs, distances, log_lines

HERE = Path(__file__).resolve().parents[1]
COUNTS = {"train": (80, 40, 20, 8), "val": (6, 6, 6, 6), "test": (5, 5, 5, 5)}  # images of the 4 classes
STEPS, CUT = 20, 10  # an epoch has 4 steps: the cut lies inside one
STAGE_STEPS, STAGES = 3, (0, 2, 3)
LOSS_BOUND, UPDATE_BOUND = 1e-5, 1e-3
BENCH_ROUNDS = 5
RECIPE = """
name: compared
seed: 3
data: {window: 4}
views:
  query: {name: small, size: 12, cutout: 4, shift: 1}
  key: {name: small, size: 12, cutout: 0, shift: 1}
  evaluation: {name: eval, size: 12, resize: 12}
model: {backbone: cifar_resnet8, width: 4, projection_dim: 8}
loss: {method: paco, alpha: 0.05, temperature: 0.2}
key_encoder: {momentum: 0.9}
queue: {length: 80}
step: {micro_batch: 8, micro_batches: 4}
optimizer: {lr: 0.05}
schedule: {epochs: 6, warmup_epochs: 1, per: step}
engine: {threads: 1}
checkpoint: {every_epochs: 100, every_steps: 10}
evaluation: {batch: 16}
metrics: {serve: false, log_every: 1}
"""
RECIPES = {
    "paco": (),
    "gpaco": ("key_encoder=none", "model.projection=three_layer", "loss.smoothing=0.1"),
    "experts": ("model.experts=3", "model.expert_width=reduced"),
    "bcl": ("loss.method=bcl", "key_encoder=none", "queue.length=0"),
    "proco": ("loss.method=proco", "key_encoder=none", "loss.temperature=0.1"),
    "multi_task": ("loss.method=multi_task", "loss.multi_task.softmax=balanced_softmax", "loss.multi_task.weight=0.5"),
    # re-weighting sets in at step 12, after the cut
    "ride": ("loss.method=ride", "model.experts=3", "model.centers=cosine", "loss.ride.reweight_epoch=3"),
    "balanced_softmax": ("loss.method=balanced_softmax",),
}
# The bench's own main with ZeRO-1 in the place of ours, whatever stage a version puts there.
STEP_BENCH = """
import sys
sys.path.insert(0, "tools/bench")
import step
step.OURS = step.Contestant("ours, stage 1", {"stage": 1})
sys.exit(step.main(["--only", "cifar_resnet32", "--bars-only", "--json", "--rounds", "15"]))
"""


class ComparisonError(Exception):
    """A command of a version failed, or a version cannot be had."""


@dataclass(frozen=True)
class Row:
    """One check: what was compared, whether it holds, and what differs first or by how much."""

    check: str
    holds: bool
    detail: str


@dataclass(frozen=True)
class Version:
    """A source tree and the folder for what it makes; `timeout` seconds for each of its commands.

    Every method raises ComparisonError if its command fails or takes longer.
    """

    name: str
    tree: Path
    work: Path
    timeout: float

    def run(self, *command: str | Path) -> str:
        """Standard output and error of a command in the tree, whose package it imports."""
        environment = os.environ | {"PYTHONPATH": str(self.tree), "OMP_NUM_THREADS": "1"}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, cwd=self.tree, env=environment, start_new_session=True, **pipes)
        text = f"{self.name}: {' '.join(map(str, command))}"
        try:
            output, _ = process.communicate(timeout=self.timeout)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # the ranks too, which are of its session
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise ComparisonError(f"{text} took over {self.timeout:g} s") from None
            raise
        if process.returncode:
            last = "\n  ".join(output.splitlines()[-20:])
            raise ComparisonError(f"{text} ended with {process.returncode}:\n  {last}")
        return output

    def check_package(self) -> None:
        """Refuse an environment in which the tree's commands would import a package from elsewhere."""
        found = self.run(sys.executable, "-c", "import paco_ds; print(paco_ds.__file__)").splitlines()[-1]
        if not Path(found).is_relative_to(self.tree):
            raise ComparisonError(f"{self.name}: {self.tree} imports paco_ds from {found}: give a checkout of paco_ds")

    def build_shards(self, images: Path) -> Path:
        shards = self.work / "shards"
        options = ("--source", "folder", "--root", images, "--output", shards, "--shard-bytes", "40000")
        self.run(sys.executable, "tools/build_shards.py", "build", *options)
        return shards

    def train(self, name: str, shards: Path, stage: int, stop: int, *overrides: str) -> Path:
        """Train, or continue, the run of that name to step `stop`; returns its folder."""
        recipe, zero, run = self.work / "recipe.yaml", self.work / f"zero{stage}.json", self.work / name
        recipe.write_text(RECIPE)
        zero.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        settings = (f"data.shards={shards}", f"engine.deepspeed={zero}", *overrides)
        self.run(
            *(Path(sys.executable).with_name("deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())),
            *("paco_ds/train.py", "--config", recipe, "--output", run, "--stop-at-step", str(stop)),
            *(word for setting in settings for word in ("--set", setting)),
        )
        return run

    def step_bench(self) -> float:
        """images/s of the trainer at ZeRO-1, in times of the DDP loop's."""
        lines = self.run(sys.executable, "-c", STEP_BENCH).splitlines()
        bars = [json.loads(line) for line in lines if line.startswith("{")]
        (ratio,) = (bar["ratio"] for bar in bars if "images/s" in bar["name"])
        return float(ratio)


def compare_recipe(name: str, old: Version, new: Version, shards: Path) -> Iterator[Row]:
    """Both versions train a recipe; then the newer one continues what the older one began."""
    overrides = RECIPES[name]
    before, after = (version.train(name, shards, 1, STEPS, *overrides) for version in (old, new))
    last = Path("checkpoints", f"step-{STEPS:08d}")
    yield row(f"{name}: log of {STEPS} steps", difference_of_logs(before, after, STEPS))
    yield row(f"{name}: checkpoint", difference_of_checkpoints(before / last, after / last))

    resumed = new.work / f"{name}-resumed"
    shutil.copytree(before, resumed)
    shutil.rmtree(resumed / last)
    new.train(resumed.name, shards, 1, STEPS, *overrides)
    found = difference_of_logs(before, resumed, STEPS) or difference_of_checkpoints(before / last, resumed / last)
    kept = [[line for line in log_lines(run) if line["step"] <= CUT] for run in (before, resumed)]
    # a run that starts again has wall times of its own
    yield row(f"{name}: resumed at step {CUT}", found or ("the run was started again" if kept[0] != kept[1] else ""))


def compare_stage(stage: int, old: Version, new: Version, shards: Path) -> Iterator[Row]:
    keep = ("checkpoint.every_steps=1", f"checkpoint.keep={STAGE_STEPS}")
    before, after = (version.train(f"stage{stage}", shards, stage, STAGE_STEPS, *keep) for version in (old, new))
    losses, update = distances(before, after, STAGE_STEPS)
    holds = losses <= LOSS_BOUND and update <= UPDATE_BOUND
    yield Row(f"stage {stage}: {STAGE_STEPS} steps", holds, f"losses {losses:.1e} apart, update {update:.1e}")


def compare_speed(old: Version, new: Version) -> Iterator[Row]:
    ratios: dict[str, list[float]] = {old.name: [], new.name: []}
    for number in range(BENCH_ROUNDS):
        for version in (old, new) if number % 2 == 0 else (new, old):
            ratios[version.name].append(version.step_bench())
    before, after = ratios.values()
    figures = (f"{v}: {statistics.median(r):.3f} ({min(r):.3f} to {max(r):.3f})" for v, r in ratios.items())
    yield Row("step bench, ZeRO-1 beside DDP", statistics.median(after) >= min(before), ", ".join(figures))


def row(check: str, difference: str) -> Row:
    return Row(check, not difference, difference or "equal")


def draw_images(root: Path) -> None:
    """Long-tailed noise with a bright stripe by class, the same each time."""
    rng = np.random.default_rng(0)
    for split, counts in COUNTS.items():
        for label, count in enumerate(counts):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                image = rng.integers(0, 120, (12, 12, 3), dtype=np.uint8)
                image[3 * label : 3 * label + 3] += 100
                cv2.imwrite(str(folder / f"{number}.png"), image)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def source_tree(given: str, unpacked: Path) -> Path:
    """The folder given, or the git revision of that name, unpacked."""
    if Path(given).is_dir():
        return Path(given).resolve()
    archive = subprocess.run(["git", "-C", HERE, "archive", given], capture_output=True, check=False)
    if archive.returncode:
        raise ComparisonError(f"--old {given} is no folder and git finds no such revision: {archive.stderr.decode()}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(unpacked, filter="data")
    return unpacked


def compare(arguments: argparse.Namespace, work: Path) -> Iterator[Row]:
    """A row for each check asked for, as it is done."""
    trees = {"old": source_tree(arguments.old, work / "source"), "new": arguments.new.resolve()}
    old, new = (Version(name, tree, work / name, arguments.timeout) for name, tree in trees.items())
    draw_images(work / "images")
    for version in (old, new):
        version.work.mkdir()
        version.check_package()
    shards, new_shards = (version.build_shards(work / "images") for version in (old, new))
    yield row("shards", difference_of_folders(shards, new_shards))
    for name in RECIPES:
        if name in arguments.only:
            yield from or_failure(name, compare_recipe(name, old, new, shards))
    for stage in STAGES if "stages" in arguments.only else ():
        yield from or_failure(f"stage {stage}", compare_stage(stage, old, new, shards))
    if arguments.step_bench:
        yield from or_failure("step bench", compare_speed(old, new))


def or_failure(check: str, rows: Iterator[Row]) -> Iterator[Row]:
    """The rows, or why there is none: the next recipe may still be compared."""
    try:
        yield from rows
    except (ComparisonError, OSError, ValueError) as error:  # a command failed, or left a file out or damaged
        yield Row(check, False, str(error))


def main(argv: Sequence[str] | None = None) -> int:
    """0 if nothing differs, 1 if anything does or a version fails, 130 interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", required=True, metavar="DIR|REVISION", help="the older version")
    parser.add_argument("--new", type=Path, default=HERE, metavar="DIR", help="the newer one (default: this checkout)")
    every = (*RECIPES, "stages")
    parser.add_argument("--only", nargs="*", choices=every, default=every, help="recipes, or the other ZeRO stages")
    parser.add_argument("--step-bench", action="store_true", help="compare the speed of a step too")
    parser.add_argument("--timeout", type=float, default=600, help="seconds of a command (default: 600)")
    parser.add_argument("--json", action="store_true", help="a JSON line per check instead of text")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the temporary folder goes, and the ranks
    same = True
    with tempfile.TemporaryDirectory(prefix="compare-versions-") as work:
        try:
            for found in compare(arguments, Path(work)):
                same &= found.holds
                text = f"{'same' if found.holds else 'DIFFERS':9}{found.check:38}{found.detail}"
                print(json.dumps(asdict(found)) if arguments.json else text, flush=True)
        except ComparisonError as error:
            parser.exit(1, f"error: {error}\n")
        except KeyboardInterrupt:
            parser.exit(130, "interrupted\n")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())

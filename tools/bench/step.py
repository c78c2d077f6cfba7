"""Bench of the whole optimizer step: speed, memory and shares beside the published design, in one run.

    python tools/bench/step.py [--rounds N] [--only SIZE] [--bars-only] [--json]

ours       the trainer of paco_ds/train.py: DeepSpeed, stream, log and all, at ZeRO-1 and, reported, stages 0, 2 and 3
published  the published design in a DistributedDataParallel loop (published_step.py), fed by the same stream
encoders   one forward of the key encoder and one forward and backward of the query encoder by themselves, on both
           ranks at once: what no design goes without

Two gloo ranks of one thread each. Every contestant lives in rank processes of its own, which take turns step by step;
a group that is not at work waits on a pipe. Queues are full, as they are in all but the first steps of a run.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The checkout need not be installed. This folder stays on the path, for the modules that benches share.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cv2
import numpy as np
import torch
from loss import ALPHA, TAU
from ranks import RankGroup
from report import MIB, Bar, at_least, print_bars, print_table

from paco_ds.config.load import validate_recipe
from paco_ds.config.recipe import Recipe
from paco_ds.data.pack.card import folder_card
from paco_ds.data.pack.shards import build_shards

WORLD_SIZE = 2
STEPS_PER_EPOCH = 62  # 1,000 images of a batch of 16; CIFAR-100-LT has 84 steps of 128
PARTS = ("data", "key forward", "query forward", "loss", "backward", "collectives", "optimizer", "EMA")


@dataclass(frozen=True)
class Contestant:
    """One way to run the step: DeepSpeed's `zero_optimization` block and `engine.` settings, or the rival."""

    name: str
    zero: dict[str, Any] = field(default_factory=lambda: {"stage": 1})
    engine: dict[str, bool] = field(default_factory=dict)
    worker: str = "step_workers:Ours"

    @property
    def file(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.name)


OURS = Contestant("ours, ZeRO-1")
RIVAL = Contestant("published, DDP", worker="step_workers:Rival")
ENCODERS = "encoders"
REPORTED = (
    *(Contestant(f"stage {stage}", {"stage": stage}) for stage in (0, 2, 3)),
    Contestant("stage 1, 16 MiB buckets", {"stage": 1, "reduce_bucket_size": 2**22, "allgather_bucket_size": 2**22}),
    Contestant("stage 2, 16 MiB buckets", {"stage": 2, "reduce_bucket_size": 2**22, "allgather_bucket_size": 2**22}),
    Contestant("stage 2, overlap_comm", {"stage": 2, "overlap_comm": True}),
    Contestant("stage 2, gradients not contiguous", {"stage": 2, "contiguous_gradients": False}),
    Contestant("stage 3, 16 MiB buckets", {"stage": 3, "reduce_bucket_size": 2**22}),
    Contestant("channels_last", engine={"channels_last": True}),
    Contestant("activation_checkpointing", engine={"activation_checkpointing": True}),
    Contestant("compile", engine={"compile": True}),
    Contestant("channels_last + compile", engine={"channels_last": True, "compile": True}),
)


@dataclass(frozen=True)
class Size:
    """A network, its batch and the published settings of its data; `rounds` measured steps of each contestant."""

    backbone: str
    pixels: int
    micro_batch: int
    classes: int
    queue: int
    dim: int
    view: str
    rounds: int
    reported: tuple[Contestant, ...] = REPORTED
    width: int = 16

    def __str__(self) -> str:
        return f"{self.backbone} {self.pixels} px, {WORLD_SIZE} x {self.micro_batch}"


SIZES = (
    Size("resnet50", 224, 8, classes=1000, queue=8192, dim=128, view="regular", rounds=5),
    Size("cifar_resnet32", 32, 64, classes=100, queue=1024, dim=32, view="small", rounds=31),
)


@dataclass
class Timing:
    """What was measured of a contestant.

    Attributes:
        seconds: of each step, until the slower rank was done.
        parts: of each step, the first rank's seconds by part.
        peak: bytes by which a rank's resident memory grew at its peak, since before the model was made.
        losses: of the first steps.
        speed: times as fast as ours at ZeRO-1, with which it took turns.
    """

    seconds: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    peak: int = 0
    losses: list[float] = field(default_factory=list)
    speed: float = 1.0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def part(self, name: str) -> float:
        """Median seconds of a part; "other" is what no part names: running statistics, the guard, the log."""
        if name == "other":
            return statistics.median(s - sum(p.values()) for s, p in zip(self.seconds, self.parts, strict=True))
        return statistics.median(p.get(name, 0.0) for p in self.parts)


class Bench:
    """Contestants at one size, on shards made for it."""

    def __init__(self, size: Size, work: Path) -> None:
        self.size, self.work = size, work
        self.shards = make_shards(size, work)

    def run(self, reported: Sequence[Contestant], rounds: int) -> dict[str, Timing]:
        """Time ours, the rival and the encoders in turn; then each reported contestant in turn with ours."""
        with self._start(OURS) as (ours, ours_timing):
            encoders = Timing()
            ours.call("encoders")  # unmeasured
            with self._start(RIVAL) as (rival, rival_timing):
                turns = [(ours, "step", ours_timing), (rival, "step", rival_timing), (ours, "encoders", encoders)]
                take_turns(turns, rounds)
            timings = {OURS.name: ours_timing, RIVAL.name: rival_timing, ENCODERS: encoders}
            for contestant in reported:
                with self._start(contestant) as (group, timing):
                    beside = Timing()
                    take_turns([(ours, "step", beside), (group, "step", timing)], max(1, rounds // 2))
                    timing.speed = median_ratio(beside.seconds, timing.seconds)
                    timings[contestant.name] = timing
        timings[RIVAL.name].speed = median_ratio(ours_timing.seconds, rival_timing.seconds)
        return timings

    @contextmanager
    def _start(self, contestant: Contestant) -> Iterator[tuple[RankGroup, Timing]]:
        """Rank processes of a contestant, past their first steps, of which memory and losses are kept."""
        config = self.work / f"{contestant.file}.json"
        config.write_text(json.dumps({"zero_optimization": contestant.zero}))
        recipe = make_recipe(self.size, self.shards, config, contestant.engine)
        group = RankGroup(WORLD_SIZE, contestant.worker, recipe, self.work / contestant.file)
        try:
            answers = group.call("warm_up")
            losses = [statistics.mean(of_ranks) for of_ranks in zip(*(loss for _, loss in answers), strict=True)]
            yield group, Timing(peak=max(peak for peak, _ in answers), losses=losses)
        finally:
            group.close()


def take_turns(turns: Sequence[tuple[RankGroup, str, Timing]], rounds: int) -> None:
    """`rounds` calls of each, in an order that rotates: nobody always follows the same."""
    for number in range(rounds):
        first = number % len(turns)
        for group, method, timing in (*turns[first:], *turns[:first]):
            answers = group.call(method)
            timing.seconds.append(max(seconds for seconds, _ in answers))
            timing.parts.append(answers[0][1])


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over rounds: the two of a round met the same conditions."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def bar_of(size: Size, timings: dict[str, Timing]) -> Bar:
    ours, rival, encoders = timings[OURS.name], timings[RIVAL.name], timings[ENCODERS]
    images = WORLD_SIZE * size.micro_batch
    speeds = {"ours": images / ours.median, "rival": images / rival.median, "floor": images / encoders.median}
    return at_least(f"{size}: images/s at ZeRO-1", median_ratio(rival.seconds, ours.seconds), 0.98, **speeds)


def print_timings(size: Size, timings: dict[str, Timing], rounds: int) -> None:
    images = WORLD_SIZE * size.micro_batch
    contestants = {name: timing for name, timing in timings.items() if name != ENCODERS}
    print_table(
        f"One optimizer step, {size}",
        ["", "ms", "images/s", "times as fast as ZeRO-1", "peak MiB a rank"],
        [
            [name, f"{1000 * t.median:.0f}", f"{images / t.median:.1f}", f"{t.speed:.2f}", f"{t.peak / MIB:.0f}"]
            for name, t in contestants.items()
        ]
        + [[ENCODERS, f"{1000 * timings[ENCODERS].median:.0f}", f"{images / timings[ENCODERS].median:.1f}", "-", "-"]],
        f"medians of {rounds} rounds of the first two and the encoders, {max(1, rounds // 2)} of the others, each in "
        f"turn with ZeRO-1; 2 gloo ranks of one thread; torch {torch.__version__}. peak: growth of resident memory "
        f"since before the model was made",
    )
    columns = [*PARTS, "other"]
    print_table(
        f"Shares of the step in %, {size}",
        ["", *columns],
        [
            [name, *(f"{100 * timing.part(part) / timing.median:.1f}" for part in columns)]
            for name, timing in contestants.items()
        ],
        "loss: its forward and the queue; its backward is part of backward. collectives: what a rank waits for them, "
        "gradients among them; DDP's, and those that overlap, run inside backward",
    )


def make_shards(size: Size, work: Path) -> Path:
    """Shards of photo-sized JPEGs (small sizes: of the view's) of blurred noise, equally many of each class, enough for
    epochs as long as those of the published sets: each begins with new windows to read."""
    rng = np.random.default_rng(0)
    height, width = (375, 500) if size.pixels > 64 else (size.pixels, size.pixels)
    images = [
        cv2.imencode(".jpg", cv2.GaussianBlur(rng.integers(0, 256, (height, width, 3), dtype=np.uint8), (0, 0), 1.5))[1]
        for _ in range(8)
    ]
    each = -(-STEPS_PER_EPOCH * WORLD_SIZE * size.micro_batch // size.classes)
    for label in range(size.classes):
        folder = work / "images" / "train" / f"{label:05d}"
        folder.mkdir(parents=True)
        for number in range(each):
            (folder / f"{number}.jpg").write_bytes(images[(label + number) % len(images)].tobytes())
    build_shards(folder_card(work / "images"), work / "images", work / "shards")
    return work / "shards"


def make_recipe(size: Size, shards: Path, deepspeed: Path, engine: dict[str, bool]) -> Recipe:
    """A recipe as published for this kind of data, but for the views; nothing is evaluated, saved or served."""
    view = {"name": size.view, "size": size.pixels}
    tree = {
        "name": "bench",
        "data": {"shards": str(shards)},
        "views": {"query": view, "key": view, "evaluation": {"size": size.pixels, "resize": size.pixels}},
        "model": {"backbone": size.backbone, "width": size.width, "projection_dim": size.dim},
        "loss": {"method": "paco", "alpha": ALPHA, "temperature": TAU},
        "queue": {"length": size.queue},
        "step": {"micro_batch": size.micro_batch, "micro_batches": WORLD_SIZE},
        "optimizer": {"lr": 0.02},
        "schedule": {"epochs": 10**6},
        "engine": {"deepspeed": str(deepspeed), "threads": 1, "digest_every": 0, **engine},
        "checkpoint": {"every_epochs": 10**6},
        "evaluation": {"every_epochs": 0, "split": None, "test_split": "train"},
        "metrics": {"serve": False, "log_every": 10**9},
    }
    return validate_recipe(tree, "tools/bench/step.py")


def main(argv: Sequence[str] | None = None, sizes: Sequence[Size] = SIZES) -> int:
    """Measure, print the tables and the bars; a bar that does not hold is printed as such and is no failure."""
    parser = argparse.ArgumentParser(description="Speed, memory and shares of one optimizer step beside the published.")
    parser.add_argument("--rounds", type=int, help="measured rounds of a size (default: its own)")
    parser.add_argument("--only", metavar="BACKBONE", help="one size alone, such as cifar_resnet32")
    parser.add_argument("--bars-only", action="store_true", help="leave out what is only reported")
    parser.add_argument("--json", action="store_true", help="end with one JSON line per bar")
    arguments = parser.parse_args(argv)
    chosen = [size for size in sizes if arguments.only in (None, size.backbone)]
    if not chosen or (arguments.rounds is not None and arguments.rounds < 1):
        parser.error(f"--only takes one of {', '.join(s.backbone for s in sizes)}, --rounds at least 1")
    bars = []
    for size in chosen:
        rounds = arguments.rounds or size.rounds
        with tempfile.TemporaryDirectory() as work:
            timings = Bench(size, Path(work)).run(() if arguments.bars_only else size.reported, rounds)
        print_timings(size, timings, rounds)
        bars.append(bar_of(size, timings))
    print_bars(bars, as_json=arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

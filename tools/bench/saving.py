"""How long a save blocks training, beside a save that training waits for.

    python tools/bench/saving.py [--repeats N] [--folder DISK] [--json]

blocked      copying what each rank holds of a checkpoint; it is put together and written by a thread while training
             goes on
synchronous  the same, and training waits until it is put together, written, flushed, read back and renamed
gathering    what it takes instead to gather whole tensors by collectives, which threads cannot do beside training

Weights and momentum are random and nothing is trained. Stage 0 on one rank; stages 1 and 3 on two ranks of this
machine, each of which holds half of momentum, and at stage 3 of weights. Medians of saves in turn.
"""

import argparse
import itertools
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

# The checkout need not be installed. This folder stays on the path, for the module that benches share.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from report import Bar, at_most, print_bars, print_table

from paco_ds.checkpoint import Checkpoints
from paco_ds.config.load import load_recipe
from paco_ds.data.manifest import SHOTS
from paco_ds.distributed.launch import leave_job
from paco_ds.distributed.parts import Parts
from paco_ds.distributed.ranks import Ranks
from paco_ds.distributed.zero import own_model, own_states, set_states, whole_model, whole_states
from paco_ds.training import engine
from paco_ds.training.build import Classes, build_model, build_step
from paco_ds.training.saver import Saver

MOST_BLOCKED = 0.05


@dataclass(frozen=True)
class Size:
    """A shipped recipe, its number of classes, and where it runs."""

    name: str
    recipe: str
    classes: int
    stage: int
    ranks: int


SIZES = (
    Size("ResNet-50, stage 0", "imagenet_lt_resnet50", 1000, 0, 1),
    Size("ResNet-152, stage 0", "inaturalist2018_resnet152", 8142, 0, 1),
    Size("ResNet-50, stage 1, 2 ranks", "imagenet_lt_resnet50", 1000, 1, 2),
    Size("ResNet-50, stage 3, 2 ranks", "imagenet_lt_resnet50", 1000, 3, 2),
    Size("ResNet-152, stage 3, 2 ranks", "inaturalist2018_resnet152", 8142, 3, 2),
)


@dataclass(frozen=True)
class Figures:
    """Bytes of a checkpoint, and seconds of rank 0."""

    bytes: int
    blocked: float
    synchronous: float
    gathering: float


def measure(size: Size, ranks: Ranks, repeats: int, folder: Path) -> Figures:
    recipe = load_recipe(size.recipe)
    counts = [1000 // rank + 1 for rank in range(1, size.classes + 1)]
    tail = Classes(counts, [SHOTS[0] if count > 100 else SHOTS[2] if count < 20 else SHOTS[1] for count in counts])
    config = {"zero_optimization": {"stage": size.stage}}
    step = build_step(recipe, build_model(recipe, tail), tail, config, ranks, total_steps=9, steps_per_epoch=3)
    set_states(step.engine, {name: torch.randn(tensor.shape) for name, tensor in whole_states(step.engine)})
    queue = step.contrast.queue.state_dict() if step.contrast else None
    saver, parts = Saver(), Parts(ranks)
    waiting = Checkpoints(folder, recipe, "random", together=parts.whole)
    not_waiting = Checkpoints(folder, recipe, "random", saver, parts.whole)

    def save(checkpoints: Checkpoints) -> float:
        ranks.wait_for_all()
        began = time.perf_counter()
        checkpoints.save(1, own_model(step.engine), own_states(step.engine), queue, {}, write=ranks.first)
        return time.perf_counter() - began

    def beside() -> float:
        seconds = save(not_waiting)
        saver.wait()
        return seconds

    def gather() -> float:
        ranks.wait_for_all()
        began = time.perf_counter()
        for _ in itertools.chain(whole_model(step.engine), whole_states(step.engine)):
            pass
        return time.perf_counter() - began

    works = {"blocked": beside, "synchronous": lambda: save(waiting), "gathering": gather}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(repeats + 1):
        for name, work in works.items():
            taken = work()
            if number:  # the first of each warms up
                seconds[name].append(taken)
    written = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) if ranks.first else 0
    saver.close()
    step.engine.destroy()
    return Figures(written, **{name: statistics.median(values) for name, values in seconds.items()})


def run_rank(rank: int, port: int, repeats: int, size: Size, folder: Path) -> None:
    """One rank: joins the others and measures; the first leaves its figures in the folder."""
    os.environ |= {
        **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_SIZE"), str(size.ranks)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "",
    }
    recipe = load_recipe(size.recipe)
    ranks = engine.start(recipe.step, recipe.engine.threads)
    figures = measure(size, ranks, repeats, folder / "run")
    if ranks.first:
        (folder / "figures.json").write_text(json.dumps(asdict(figures)))
    ranks.wait_for_all()
    leave_job()


def run_ranks(size: Size, repeats: int, place: Path | None) -> Figures:
    """Figures of rank 0; a rank that fails ends all with what it said."""
    with socket.socket() as probe, tempfile.TemporaryDirectory(dir=place) as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        torch.multiprocessing.spawn(run_rank, (port, repeats, size, Path(folder)), nprocs=size.ranks)
        return Figures(**json.loads(Path(folder, "figures.json").read_text()))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and the bars; a bar that does not hold is printed as such and is no failure."""
    parser = argparse.ArgumentParser(description="How long a save blocks training.")
    parser.add_argument("--repeats", type=int, default=5, help="measured saves of each kind (default %(default)s)")
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="of how many sizes, from the first on")
    parser.add_argument("--folder", type=Path, help="on the disk that is written (default: the temporary folder)")
    parser.add_argument("--json", action="store_true", help="end with one JSON line per bar")
    arguments = parser.parse_args(argv)
    measured = {size.name: run_ranks(size, arguments.repeats, arguments.folder) for size in SIZES[: arguments.sizes]}
    print_table(
        "Saving: seconds for which training is blocked",
        ["run", "MB", "blocked", "gathering instead", "synchronous", "share"],
        [
            [
                name,
                f"{f.bytes / 1e6:.0f}",
                f"{f.blocked:.3f}",
                f"{f.gathering:.3f}",
                f"{f.synchronous:.2f}",
                f"{f.blocked / f.synchronous:.1%}",
            ]
            for name, f in measured.items()
        ],
        f"medians of {arguments.repeats} in turn, torch {torch.__version__}",
    )
    bars: list[Bar] = [
        at_most(
            f"{name}: blocked / synchronous save, s",
            f.blocked / f.synchronous,
            MOST_BLOCKED,
            ours=f.blocked,
            rival=f.synchronous,
            floor=f.gathering,
        )
        for name, f in measured.items()
    ]
    print_bars(bars, as_json=arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Owns the bench of watching: what p_c, p+ and their optima by shot add to every optimizer step, in one run.

    python tools/bench/watching.py [--repeats N] [--ranks W] [--json]

step       an optimizer step of the real thing on W gloo ranks, made images, its queue full
computing  the four values of each anchor, of all micro-batches of a rank: what the loss computes beside itself
adding     summing them by shot, and the same call for a loss that has none to tell of
reducing   the vector of the step's one reduction, and the same without the sums by shot
telling    the line of metrics.jsonl and the gauges, with and without them

Added is computing, and what the other three take more than without, counted as 0 where noise makes it less. All are
measured in turn on all ranks, the small ones many times in a row so that ranks wait for each other once in as many;
figures are medians of single calls.
"""

import argparse
import itertools
import json
import math
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

# The checkout need not be installed. This folder stays on the path, for the module that benches share.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from report import Bar, at_most, print_bars, print_table

from paco_ds.config.load import load_recipe
from paco_ds.config.recipe import Recipe
from paco_ds.contrast.key_queue import QueueSnapshot
from paco_ds.data.manifest import SHOTS
from paco_ds.data.stream.batches import MicroBatch
from paco_ds.distributed.launch import leave_job
from paco_ds.distributed.ranks import Ranks
from paco_ds.losses.base import Anchors, LossOutput
from paco_ds.losses.paco import ParametricContrastiveLoss
from paco_ds.metrics.exporter import Exporter
from paco_ds.metrics.log import MetricsLog
from paco_ds.metrics.steps import StepRecord
from paco_ds.training import engine
from paco_ds.training.build import Classes, build_model, build_step
from paco_ds.training.step import Step
from paco_ds.training.step_result import StepResult
from paco_ds.training.totals import StepTotals

ROOT = Path(__file__).resolve().parents[2]
IN_A_ROW = 20
MOST_SHARE = 0.01


@dataclass(frozen=True)
class Size:
    """A run: the demo's recipe with overrides, and the number of classes. Small, for that is where watching shows."""

    name: str
    classes: int
    overrides: tuple[str, ...] = ()


SIZES = (
    Size("demo, ResNet-20, 28 px, m 32", 10),
    Size(
        "ResNet-32, 32 px, m 64, 100 classes",
        100,
        (
            "model.backbone=cifar_resnet32",
            *(f"views.{view}.size=32" for view in ("query", "key")),
            "step.micro_batch=64",
            "queue.length=1024",
            "data.classes=100",
        ),
    ),
)


@dataclass(frozen=True)
class Figures:
    """Milliseconds of one step's share, of rank 0."""

    step_ms: float
    computing_ms: float
    adding_ms: float
    adding_off_ms: float
    reducing_ms: float
    reducing_off_ms: float
    telling_ms: float
    telling_off_ms: float

    @property
    def added_ms(self) -> float:
        more = (
            self.adding_ms - self.adding_off_ms,
            self.reducing_ms - self.reducing_off_ms,
            self.telling_ms - self.telling_off_ms,
        )
        return self.computing_ms + sum(max(difference, 0.0) for difference in more)


@dataclass(frozen=True)
class AnchorTerms:
    """What the loss has at hand for each anchor when it comes to the four values; see `losses.paco`."""

    own_B: Tensor
    lse_B: Tensor
    similarity_B: Tensor
    positives_B: Tensor
    weight_B: Tensor

    @torch.no_grad()
    def values(self, loss: ParametricContrastiveLoss) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """p_c, its optimum, p+ and its optimum, by the operations of the loss."""
        center_B = (self.own_B - self.lse_B).exp()
        positive_B = loss.gamma * (self.similarity_B / self.positives_B - self.lse_B).exp()
        center_optimum_B = loss.beta * (1 - loss.smoothing) / self.weight_B
        return (
            center_B,
            center_optimum_B,
            positive_B,
            (loss.alpha / self.weight_B).where(self.positives_B > 0, torch.nan),
        )


@torch.no_grad()
def anchor_terms(loss: ParametricContrastiveLoss, anchors: Anchors) -> AnchorTerms:
    """The terms of a loss's inputs, by a softmax over everything."""
    labels_B, logits_BC, query_BD = anchors.labels_B, anchors.logits, anchors.queries
    key_BD, queue = anchors.keys, anchors.queue
    assert logits_BC is not None
    assert query_BD is not None
    assert key_BD is not None
    assert queue is not None
    z_BC = logits_BC if loss.log_prior_C is None else logits_BC + loss.log_prior_C
    s_BA = query_BD @ torch.cat([query_BD, key_BD, queue.keys_ND]).T / loss.temperature
    itself_BA = torch.eye(*s_BA.shape, dtype=torch.bool)
    positive_BA = (labels_B[:, None] == torch.cat([labels_B, labels_B, queue.labels_N])) & ~itself_BA
    positives_B = positive_BA.sum(1).float()
    return AnchorTerms(
        own_B=z_BC.gather(1, labels_B[:, None])[:, 0],
        lse_B=torch.cat([z_BC, s_BA.masked_fill(itself_BA, -torch.inf)], 1).logsumexp(1),
        similarity_B=(s_BA * positive_BA).sum(1),
        positives_B=positives_B,
        weight_B=loss.beta + loss.alpha * positives_B,
    )


def make_step(recipe: Recipe, classes: int, ranks: Ranks) -> Step:
    """A step as the trainer builds it, on classes of 1000 / 1, 1000 / 2, ... images."""
    counts = [1000 // rank for rank in range(1, classes + 1)]
    shots = [SHOTS[0] if count > 100 else SHOTS[2] if count < 20 else SHOTS[1] for count in counts]
    tail = Classes(counts, shots)
    config = {"zero_optimization": {"stage": 1}}
    return build_step(recipe, build_model(recipe, tail), tail, config, ranks, total_steps=1000, steps_per_epoch=1000)


def make_micro_batches(step: Step, recipe: Recipe, classes: int) -> list[MicroBatch]:
    """Noise with labels of a long tail, another for each rank."""
    generator = torch.Generator().manual_seed(step.layout.rank)
    m, size = recipe.step.micro_batch, recipe.views.query.size
    shares = 1 / torch.arange(1.0, classes + 1)
    batches = []
    for _ in step.layout.own:
        query, key = torch.randint(0, 256, (2, m, 3, size, size), generator=generator, dtype=torch.uint8)
        labels = torch.multinomial(shares, m, replacement=True, generator=generator)
        batches.append(MicroBatch(query, key, labels, torch.arange(m), torch.ones(m, dtype=torch.bool)))
    return batches


def measure(size: Size, ranks: Ranks, repeats: int, folder: Path) -> Figures:
    recipe = load_recipe(ROOT / "ds_configs" / "recipes" / "demo.yaml", size.overrides)
    step = make_step(recipe, size.classes, ranks)
    batches = make_micro_batches(step, recipe, size.classes)
    numbers = itertools.count()
    seen: list[Anchors] = []
    loss = step.forward.loss
    assert isinstance(loss, ParametricContrastiveLoss)

    def listening(anchors: Anchors) -> LossOutput:
        logits, queries, queue = anchors.logits, anchors.queries, anchors.queue
        assert logits is not None
        assert queries is not None
        assert queue is not None
        # a later push changes the queue: what this step saw of it is copied
        met = QueueSnapshot.of(queue.keys_ND.clone(), queue.labels_N.clone(), size.classes)
        seen[:] = [replace(anchors, logits=logits.detach(), queries=queries.detach(), queue=met)]
        output: LossOutput = loss(anchors)
        return output

    step.forward.loss = listening
    fills = math.ceil(recipe.queue.length / step.layout.global_batch)
    *_, result = (step(next(numbers), batches, 0.01) for _ in range(fills + 1))  # the last one meets a full queue
    step.forward.loss = loss
    terms, output = anchor_terms(loss, seen[0]), loss(seen[0])
    for ours, expected in zip(terms.values(loss), list(asdict(output).values())[1:5], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)  # else the wrong thing is measured

    works = small_works(step, terms, output, seen[0].labels_B, result, folder / f"{ranks.rank}.jsonl")
    works["step"] = lambda: step(next(numbers), batches, 0.01)
    ms = {f"{name}_ms": 1000 * seconds for name, seconds in median_call(works, repeats).items()}
    step.engine.destroy()
    return Figures(**ms)


def median_call(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of one call of each, all in turn in an order that rotates; all but the step many in a row."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for number in range(repeats):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            for _ in range(1 if name == "step" else IN_A_ROW):
                start = time.perf_counter()
                works[name]()
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def small_works(
    step: Step, terms: AnchorTerms, output: LossOutput, labels_B: Tensor, result: StepResult, log_path: Path
) -> dict[str, Callable[[], object]]:
    """One step's share of each part, by name; `_off` is the same without what is watched."""
    device, accumulation, loss = step.ranks.device, step.layout.accumulation, step.forward.loss
    assert isinstance(loss, ParametricContrastiveLoss)
    silent = LossOutput(output.loss)
    vector = StepTotals(step.shots_CS).vector
    alone, nothing = Ranks(0, 1, 0, device), torch.zeros(1)
    exporter, log = Exporter(), MetricsLog(log_path)
    quiet = StepRecord(1, 0, result.loss, 0.1, result.grad_norm, 400.0, 0.0, 0.1, 1.0)
    record = replace(
        quiet,
        center_probability=result.center_probability,
        center_probability_optimum=result.center_probability_optimum,
        positive_probability=result.positive_probability,
        positive_probability_optimum=result.positive_probability_optimum,
    )

    def add(outputs: LossOutput) -> None:
        totals = StepTotals(step.shots_CS)
        for _ in range(accumulation):
            totals.add(outputs, labels_B)
        totals.begin_sum(alone, nothing)

    def tell(told: StepRecord) -> None:
        log.step(told)
        exporter.observe_step(told, 1)

    return {
        "computing": lambda: [terms.values(loss) for _ in range(accumulation)],
        "adding": lambda: add(output),
        "adding_off": lambda: add(silent),
        "reducing": lambda: step.ranks.sum(vector.clone()).cpu(),
        "reducing_off": lambda: step.ranks.sum(vector[:4].clone()).cpu(),
        "telling": lambda: tell(record),
        "telling_off": lambda: tell(quiet),
    }


def run_rank(rank: int, world_size: int, port: int, repeats: int, sizes: Sequence[Size], folder: Path) -> None:
    """One rank: joins the others, measures, and leaves its figures in the folder."""
    os.environ |= {
        **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_SIZE"), str(world_size)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "",
    }
    recipe = load_recipe(ROOT / "ds_configs" / "recipes" / "demo.yaml", ())
    ranks = engine.start(recipe.step, recipe.engine.threads)
    figures = [asdict(measure(size, ranks, repeats, folder)) for size in sizes]
    (folder / f"{rank}.json").write_text(json.dumps(figures))
    ranks.wait_for_all()
    leave_job()


def run_ranks(world_size: int, repeats: int, sizes: Sequence[Size]) -> list[Figures]:
    """Figures of rank 0 at each size; a rank that fails ends all with what it said."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        arguments = (world_size, port, repeats, sizes, Path(folder))
        torch.multiprocessing.spawn(run_rank, arguments, nprocs=world_size)
        return [Figures(**row) for row in json.loads(Path(folder, "0.json").read_text())]


def main(argv: Sequence[str] | None = None, sizes: Sequence[Size] = SIZES) -> int:
    """Measure, print the table and the bars; a bar that does not hold is printed as such and is no failure."""
    parser = argparse.ArgumentParser(description="What p_c and p+ of every step add to its time.")
    parser.add_argument("--repeats", type=int, default=30, help="measured rounds per size (default %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="gloo ranks on this machine (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="end with one JSON line per bar")
    arguments = parser.parse_args(argv)
    measured = dict(zip(sizes, run_ranks(arguments.ranks, arguments.repeats, sizes), strict=True))
    print_table(
        "Watching p_c and p+ of every step: milliseconds of a step",
        [
            "run",
            "step",
            "computing",
            "adding: on",
            "off",
            "reducing: on",
            "off",
            "telling: on",
            "off",
            "added",
            "share",
        ],
        [
            [
                size.name,
                *(f"{ms:.3f}" for ms in asdict(f).values()),
                f"{f.added_ms:.3f}",
                f"{f.added_ms / f.step_ms:.2%}",
            ]
            for size, f in measured.items()
        ],
        f"{arguments.ranks} gloo ranks, medians of {arguments.repeats} in turn, torch {torch.__version__}",
    )
    bars: list[Bar] = [
        at_most(f"{size.name}: added / step, ms", f.added_ms / f.step_ms, MOST_SHARE, ours=f.added_ms, floor=f.step_ms)
        for size, f in measured.items()
    ]
    print_bars(bars, as_json=arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

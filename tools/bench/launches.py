"""Owns the count of what a step asks of the device beside its encoders: operations, host reads, copies to the host.

    python tools/bench/launches.py [--backbone NAME] [--size PX] [--micro-batch N] [--stage S ...] [--json]

It counts, it does not time, so it needs no GPU: one whole step (M = 2 on one rank, PaCo, a full queue) runs under a
dispatch mode that sees every operation. A GPU starts each with a launch of its own, and one whose result the host reads
makes it wait for all before.

operations  all of the step without those of the same encoders' bare forward and backward, a micro-batch
host reads  operations whose result is a Python number or a shape (`item`, `nonzero`, `bincount`, a boolean index), and
            calls of `tolist`, `numpy` and `cpu`, by the line of the project or of DeepSpeed that asks
copies      to the host, of the step's figures: they are waited for a step later
views       operations in which a device renders both views of a micro-batch, before the step
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

# The checkout need not be installed. This folder stays on the path, for the module that benches share.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from operations import HOST_COPY, Counted, counting
from report import at_most, print_bars, print_table

from paco_ds.config.load import load_recipe
from paco_ds.data.stream.batches import MicroBatch
from paco_ds.data.stream.views import MakeRawViews, make_view, raw_batch, render
from paco_ds.distributed.launch import free_port, leave_job
from paco_ds.randomness import DrawPurpose, generator
from paco_ds.training import engine
from paco_ds.training.build import Classes, build_model, build_step
from paco_ds.training.step import Step

ROOT = Path(__file__).resolve().parents[2]
MICRO_BATCHES = 2
MOST_OPERATIONS = 120  # a micro-batch, beyond the encoders
MOST_OF_VIEWS = 260  # of both views of a micro-batch of 32


def make_step(backbone: str, size: int, micro_batch: int, stage: int) -> tuple[Step, list[MicroBatch]]:
    """A PaCo step of one rank with its micro-batches, made of noise."""
    overrides = (
        f"model.backbone={backbone}",
        f"step.micro_batch={micro_batch}",
        f"step.micro_batches={MICRO_BATCHES}",
        f"queue.length={2 * MICRO_BATCHES * micro_batch}",
        *(f"views.{view}.size={size}" for view in ("query", "key", "evaluation")),
    )
    recipe = load_recipe(ROOT / "ds_configs" / "recipes" / "imagenet_lt_resnet50.yaml", overrides)
    ranks = engine.start(recipe.step, None)
    classes = Classes([1000 // rank for rank in range(1, 101)], ["many"] * 10 + ["medium"] * 40 + ["few"] * 50)
    config = {"zero_optimization": {"stage": stage}}
    step = build_step(
        recipe, build_model(recipe, classes), classes, config, ranks, total_steps=1000, steps_per_epoch=1000
    )
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(MICRO_BATCHES):
        query, key = torch.randint(0, 256, (2, micro_batch, 3, size, size), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, 100, (micro_batch,), generator=generator)
        batches.append(MicroBatch(query, key, labels, torch.arange(micro_batch), torch.ones(micro_batch).bool()))
    return step, batches


def of_step(step: Step, batches: list[MicroBatch]) -> Counted:
    """Those of one step with a full queue, whose figures are read after the next has begun."""
    for number in range(4):  # fills the queue
        step(number, batches, 0.01)
    with counting() as counted:
        step(4, batches, 0.01)
    return counted


def of_encoders(step: Step, batches: list[MicroBatch]) -> Counted:
    """Those of the bare encoders on the same micro-batches: of keys, and of queries there and back."""
    model = step.engine.module
    with counting() as counted:
        for batch in batches:
            with torch.no_grad():
                model.key_encoder(model.normalize(batch.key))
            outputs = model.query_encoder(model.normalize(batch.query))
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    model.zero_grad(set_to_none=True)
    return counted


def of_views(images: int, size: int = 32) -> Counted:
    """Those of rendering both views of some photographs, of the recipe's draws; counts do not depend on `size`."""
    from views import photographs  # with a library of pictures, which the step does not need

    sized = [f"views.{view}.size={size}" for view in ("query", "key", "evaluation")]
    recipe = load_recipe(ROOT / "ds_configs" / "recipes" / "imagenet_lt_resnet50.yaml", sized)
    make = MakeRawViews(tuple(map(make_view, recipe.training_views)), recipe.data.max_pixels, size)
    purposes = DrawPurpose.QUERY_VIEW, DrawPurpose.KEY_VIEW
    pairs = [make(photo, *(generator(p, 1, 0, n) for p in purposes)) for n, photo in enumerate(photographs(images))]
    raws = [view for of_view in zip(*pairs, strict=True) for view in of_view]
    pixels = torch.cat([torch.from_numpy(raw.patch.pixels.copy()).flatten() for raw in raws])
    with counting() as counted:
        render(pixels, raw_batch(raws), size, torch.device("cpu"))
    return counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet50", help="of the step (default: resnet50)")
    parser.add_argument("--size", type=int, default=64, help="pixels; counts do not depend on it (default: 64)")
    parser.add_argument("--micro-batch", type=int, default=32, help="images of a micro-batch (default: 32)")
    parser.add_argument("--stage", type=int, nargs="+", default=[0, 1, 2], help="ZeRO stages (default: 0 1 2)")
    parser.add_argument("--names", action="store_true", help="also list the operations beyond the encoders by name")
    parser.add_argument("--json", action="store_true", help="end with one JSON line per bar")
    arguments = parser.parse_args()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = free_port()
    bars, rows = [], []
    for stage in arguments.stage:
        step, batches = make_step(arguments.backbone, arguments.size, arguments.micro_batch, stage)
        ours, encoders = of_step(step, batches), of_encoders(step, batches)
        beyond = (ours.total - encoders.total) / MICRO_BATCHES
        reads = sum(ours.host_reads.values())
        rows.append([f"stage {stage}", *map(str, (ours.total, encoders.total, round(beyond), reads))])
        if arguments.names:
            print(stage, (ours.operations - encoders.operations).most_common(60))
        for place, count in ours.host_reads.most_common():
            print(f"stage {stage}: {count} x {place}")
        if stage == 0:
            for name, figure, most in (
                ("operations beyond the encoders, a micro-batch", beyond, MOST_OPERATIONS),
                ("host reads in a step, stage 0", reads, 0),
                ("copies to the host in a step, asynchronous", ours.operations[HOST_COPY], 1),
            ):
                bars.append(at_most(name, figure, most, ours=figure))
        step.engine.destroy()
    leave_job()
    rendering = of_views(arguments.micro_batch).total
    rows.append(["both views on the device", "", "", str(rendering), ""])
    bars.append(at_most("operations of both views on the device", rendering, MOST_OF_VIEWS, ours=rendering))
    print_table("One step, M = 2", ["", "operations", "of the encoders", "beyond, a micro-batch", "host reads"], rows)
    print_bars(bars, as_json=arguments.json)


if __name__ == "__main__":
    main()

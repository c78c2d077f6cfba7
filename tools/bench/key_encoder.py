"""Owns the bench of the key encoder: the cost of its moving average, and its memory at ZeRO stage 3.

    python tools/bench/key_encoder.py [--repeats N] [--json]

ours       the fused update of all parameters (`KeyEncoder.update`)
published  the loop over parameters of the published code: key * m + query * (1 - m), one parameter at a time
floor      the same arithmetic on two flat tensors of that many elements
step       a whole optimizer step of ResNet-50 on one rank, m = 8, M = 1, 224 px: keys, queries, loss, update, SGD

Memory is what a rank holds of the key encoder's weights after a forward of keys: its partitions, and the full copies
that DeepSpeed keeps of small parameters unless `stage3_param_persistence_threshold` is 0.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

# The checkout need not be installed. This folder stays on the path, for the modules that benches share.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ranks import on_ranks
from report import MIB, Bar, at_most, median_seconds, print_bars, print_table

RECIPE = Path(__file__).resolve().parents[2] / "ds_configs" / "recipes" / "resnet50.yaml"
CLASSES, QUEUE = 1000, 8192
WORLD_SIZES = (1, 2, 4)
THRESHOLDS = {"all partitioned": 0, "DeepSpeed's default": 100_000}


def update_milliseconds(repeats: int, overrides: Sequence[str], pixels: int) -> dict[str, float]:
    """Milliseconds of `ours`, `published`, `floor` and `step`, on one rank of its own process."""
    from paco_ds.data.stream.batches import MicroBatch
    from paco_ds.distributed.launch import leave_job

    step, settings = _make_step({"stage": 0}, (*overrides, "step.micro_batches=1"))
    key = list(step.engine.module.key_encoder.parameters())
    query = list(step.engine.module.query_encoder.parameters())
    flat = [torch.cat([p.detach().flatten() for p in parameters]) for parameters in (key, query)]
    m = settings.step.micro_batch
    generator = torch.Generator().manual_seed(0)
    query_view, key_view = torch.randint(0, 256, (2, m, 3, pixels, pixels), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (m,), generator=generator)
    micro_batch = MicroBatch(query_view, key_view, labels, torch.arange(m), torch.ones(m, dtype=torch.bool))
    works: dict[str, Callable[[], object]] = {
        "ours": lambda: step.contrast.key_encoder.update(0),
        "published": lambda: published_update(key, query, 0.999),
        "floor": lambda: flat[0].lerp_(flat[1], 0.001),
        "step": lambda: step(0, [micro_batch], settings.lr),
    }
    seconds = median_seconds(works, repeats)
    step.engine.destroy()
    leave_job()
    return {name: 1000 * value for name, value in seconds.items()}


@torch.no_grad()
def published_update(key: Iterable[Parameter], query: Iterable[Parameter], momentum: float) -> None:
    for k, q in zip(key, query, strict=True):
        k.data = k.data * momentum + q.data * (1.0 - momentum)


def held_bytes(threshold: int, overrides: Sequence[str]) -> int:
    """Bytes that this rank holds of the key encoder's weights at stage 3."""
    from paco_ds.distributed.launch import leave_job

    zero = {"stage": 3, "stage3_param_persistence_threshold": threshold}
    step, settings = _make_step(zero, overrides)
    images = torch.zeros(2, 3, settings.views.key.size, settings.views.key.size, dtype=torch.uint8)
    step.engine(images, keys=True)
    held = sum(map(_bytes_of, step.engine.module.key_encoder.parameters()))
    step.engine.destroy()
    leave_job()
    return held


def _bytes_of(parameter: Any) -> int:
    partition: Tensor = parameter.ds_tensor
    whole = parameter.data.numel() and parameter.data.data_ptr() != partition.data_ptr()
    return partition.nbytes + (parameter.data.nbytes if whole else 0)


def _make_step(zero: dict[str, Any], overrides: Sequence[str]) -> tuple[Any, Any]:
    """(a step, its recipe) as a trainer puts it together, with random weights and no data set."""
    from paco_ds.config.load import load_recipe
    from paco_ds.training import engine
    from paco_ds.training.build import Classes, build_model, build_step

    recipe = load_recipe(RECIPE, ("step.micro_batch=8", f"queue.length={QUEUE}", *overrides))
    ranks = engine.start(recipe.step, recipe.engine.threads)
    classes = Classes([1] * CLASSES, ["many"] * CLASSES)
    config = {"zero_optimization": zero}
    step = build_step(recipe, build_model(recipe, classes), classes, config, ranks, total_steps=1, steps_per_epoch=1)
    return step, recipe


def main(argv: Sequence[str] | None = None, overrides: Sequence[str] = (), pixels: int = 224) -> int:
    """Measure, print the tables and the bars; a bar that does not hold is printed as such and is no failure."""
    parser = argparse.ArgumentParser(description="The moving average's share of a step; memory at ZeRO stage 3.")
    parser.add_argument("--repeats", type=int, default=7, help="measured rounds (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="end with one JSON line per bar")
    arguments = parser.parse_args(argv)
    (ms,) = on_ranks(1, update_milliseconds, arguments.repeats, overrides, pixels)
    held = {
        name: {W: max(on_ranks(W, held_bytes, threshold, overrides)) for W in WORLD_SIZES}
        for name, threshold in THRESHOLDS.items()
    }
    print_table(
        "One moving average of the key encoder: milliseconds",
        ["", *ms],
        [["ms", *(f"{value:.1f}" for value in ms.values())]],
        f"one rank, float32, medians of {arguments.repeats} in turn, torch {torch.__version__}",
    )
    print_table(
        "Key encoder's weights at stage 3: MiB on the rank that holds most",
        ["persistence threshold", *(f"{W} ranks" for W in WORLD_SIZES)],
        [[name, *(f"{by_rank[W] / MIB:.2f}" for W in WORLD_SIZES)] for name, by_rank in held.items()],
    )
    print_bars(_bars(ms, held["all partitioned"]), as_json=arguments.json)
    return 0


def _bars(ms: dict[str, float], held: dict[int, int]) -> list[Bar]:
    figures = {"ours": ms["ours"], "rival": ms["published"], "floor": ms["floor"]}
    bars = [at_most("moving average ms, share of a step, m = 8", ms["ours"] / ms["step"], 0.01, **figures)]
    for W in WORLD_SIZES[1:]:
        share = {"ours": held[W] / MIB, "rival": held[1] / MIB, "floor": held[1] / MIB / W}
        bars.append(at_most(f"key encoder MiB a rank, stage 3, {W} ranks, x {W}", held[W] * W / held[1], 1.01, **share))
    return bars


if __name__ == "__main__":
    sys.exit(main())

"""The step of version 0.8.0 for the GPU bench, as it shipped: float32, NCHW, eager, its results read at once.

    PYTHONPATH=CHECKOUT python tools/bench/gpu_0_8.py '{"backbone": "resnet50", "micro_batch": 32, ...}'

prints the figures as one line of JSON, as gpu_ours.py does for the versions whose modules lie as today's. It runs
beside a checkout of 0.8.0 alone: nothing of the present package is imported.
"""

# mypy: ignore-errors
# The modules of that version are not those of this one.

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
from gpu_figures import measure


def make_step(size: Any) -> tuple[Any, Any, Callable[[], None]]:
    """(its step, its ranks, one call of it on random images), one micro-batch a step on one rank without ZeRO."""
    import paco_ds.engine as engine
    from paco_ds.key_encoder import make_key_encoder
    from paco_ds.key_queue import KeyQueue
    from paco_ds.recipe_file import load_recipe
    from paco_ds.step import Step

    from paco_ds.data.stream.batches import MicroBatch
    from paco_ds.distributed import MicroBatchLayout
    from paco_ds.losses import make_loss
    from paco_ds.models.recogniser import make_recogniser

    if not torch.cuda.is_available():  # it would build an operation for collectives of CPU ranks, of which there is one
        deepspeed.ops.__compatible_ops__ = {}
        engine.check_prerequisites = lambda: None
    recipe = load_recipe(
        Path(engine.__file__).parents[1] / "ds_configs/recipes/imagenet_lt_resnet50.yaml",
        (
            f"model.backbone={size.backbone}",
            f"model.width={size.width}",
            f"data.classes={size.classes}",
            f"queue.length={size.queue}",
            f"step.micro_batch={size.micro_batch}",
            "step.micro_batches=1",
            *(f"views.{view}.size={size.pixels}" for view in ("query", "key", "evaluation")),
        ),
    )
    ranks, total = engine.start(recipe), 10**6
    layout = MicroBatchLayout(size.micro_batch, 1, 0, 1)
    model = make_recogniser(recipe, size.classes, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    config = {"zero_optimization": {"stage": 0}}
    around, optimizer = engine.initialise(model, recipe, config, layout, ranks)
    step = Step(
        around,
        optimizer,
        make_loss(recipe.loss, [100] * size.classes, [str(label) for label in range(size.classes)]).to(ranks.device),
        layout,
        ranks,
        ["many"] * size.classes,
        make_key_encoder(around, recipe, layout, ranks, total),
        KeyQueue(size.queue, recipe.model.key_dim, ranks.device),
        contrast_scope=recipe.loss.contrast_scope,
        steps_per_epoch=total,
    )
    m, pin = size.micro_batch, ranks.device.type == "cuda"
    number, batches = 0, []
    for _ in range(2):
        views = [torch.randint(0, 256, (m, 3, size.pixels, size.pixels), dtype=torch.uint8) for _ in range(2)]
        query, key = (view.pin_memory() if pin else view for view in views)
        labels = torch.randint(0, size.classes, (m,))
        batches.append(MicroBatch(query, key, labels, torch.arange(m), torch.ones(m, dtype=torch.bool)))

    def run() -> None:
        nonlocal number
        step(number, [batches[number % 2]], recipe.lr)
        number += 1

    return step, ranks, run


def encoders(step: Any, images: torch.Tensor) -> Callable[[], None]:
    """Forward of the key encoder, forward and backward of the query encoder."""
    module = step.engine.module

    def run() -> None:
        module(images, keys=True)
        rows = [row for row in module(images) if row is not None]
        torch.autograd.backward(rows, [torch.ones_like(row) for row in rows])

    return run


def main() -> int:
    size = SimpleNamespace(**json.loads(sys.argv[1])["size"])
    step, ranks, run = make_step(size)
    found = measure(run, size.micro_batch, ranks.device, warm_up=size.warm_up, steps=size.steps)
    shape = (size.micro_batch, 3, size.pixels, size.pixels)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=ranks.device)
    bare = measure(encoders(step, images), size.micro_batch, ranks.device, warm_up=2, steps=size.steps, rate_alone=True)
    print(json.dumps({"figures": asdict(found), "encoders": bare.images_per_second}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

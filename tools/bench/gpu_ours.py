"""Our step for the GPU bench, and its encoders alone, by what this version and earlier ones of the package have.

    PYTHONPATH=CHECKOUT python tools/bench/gpu_ours.py '{"backbone": "resnet50", "micro_batch": 32, ...}'

prints the figures of a row as one line of JSON: so the bench asks another checkout for its step.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import cycle
from typing import Any

import torch
from gpu_figures import Figures, measure
from torch import Tensor

from paco_ds.config.load import load_recipe
from paco_ds.config.recipe import Recipe
from paco_ds.data.stream.batches import MicroBatch
from paco_ds.distributed.ranks import Ranks
from paco_ds.training import engine
from paco_ds.training.build import Classes, build_model, build_step

try:
    from paco_ds.config.engine import EngineSettings
except ImportError:  # before 0.15
    from paco_ds.config.recipe import EngineSettings


@dataclass(frozen=True)
class Size:
    """A network and its batch; of experts RIDE's loss. `width` is a CIFAR ResNet's, others have their own."""

    backbone: str
    micro_batch: int
    pixels: int = 224
    classes: int = 1000
    queue: int = 8192
    experts: int | None = None
    width: int = 16
    warm_up: int = 8
    steps: int = 30


@dataclass(frozen=True)
class Way:
    """How the step is run.

    Attributes:
        late: read what a step did while the next one runs, as a run may; else before it begins.
        engine: settings of the section; those that a version does not have are left out.
    """

    autocast: bool = False
    late: bool = True
    engine: dict[str, Any] = field(default_factory=dict)


class Ours:
    """A step of the package; one rank, one micro-batch, without ZeRO.

    Args:
        batches: what it trains on; random images by default.
    """

    def __init__(self, size: Size, way: Way, batches: Iterator[MicroBatch] | None = None) -> None:
        self.way, recipe = way, make_recipe(size, way)
        self.ranks = joined()
        device = self.ranks.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        config = {
            "zero_optimization": {"stage": 0},
            "torch_autocast": {"enabled": way.autocast, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        }
        classes = Classes([100] * size.classes, ["many"] * size.classes)
        model, total = build_model(recipe, classes), 10**6
        self.step = build_step(recipe, model, classes, config, self.ranks, total_steps=total, steps_per_epoch=total)
        self.lr, self.number = recipe.lr, 0
        self.batches = batches or cycle([micro_batch(size, pinned=device.type == "cuda") for _ in range(2)])
        self.before: Any = None

    def __call__(self) -> None:
        """One optimizer step."""
        result = self.step(self.number, [next(self.batches)], self.lr)
        read = self.before if self.way.late else result
        if read is not None:
            float(read.loss)
        self.before, self.number = result, self.number + 1

    def encoders(self) -> Callable[[], None]:
        """Forward of the key encoder, forward and backward of the query encoder: what no design goes without."""
        module, device = self.step.engine.module, self.ranks.device
        images = next(self.batches).query.to(device)

        def run() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=self.way.autocast):
                if module.key_encoder is not None:
                    module(images, keys=True)
                output = module(images)
            rows = [t for t in (output.logits, output.queries) if t is not None]
            torch.autograd.backward(rows, [torch.ones_like(t) for t in rows])

        return run

    def close(self) -> None:
        self.step.engine.destroy()
        self.step = None  # type: ignore[assignment]


@cache
def joined() -> Ranks:
    """This process as the one rank of a job."""
    return engine.start(load_recipe("imagenet_lt_resnet50").step, threads=None)


def make_recipe(size: Size, way: Way) -> Recipe:
    """The recipe of ImageNet-LT at this size; RIDE's loss for experts."""
    known = {key: value for key, value in way.engine.items() if key in EngineSettings.model_fields}
    view = f"{{name: regular, size: {size.pixels}}}"
    return load_recipe(
        "imagenet_lt_resnet50",
        (
            f"model.backbone={size.backbone}",
            f"model.width={size.width}",
            f"data.classes={size.classes}",
            f"queue.length={size.queue}",
            f"step.micro_batch={size.micro_batch}",
            "step.micro_batches=1",
            f"views.query={view}",
            f"views.key={view}",
            f"views.evaluation={{name: eval, size: {size.pixels}, resize: {size.pixels}}}",
            *(("loss.method=ride", f"model.experts={size.experts}", "model.centers=cosine") if size.experts else ()),
            *(f"engine.{key}={json.dumps(value)}" for key, value in known.items()),
        ),
    )


def micro_batch(size: Size, *, pinned: bool) -> MicroBatch:
    """Random images and labels, in page-locked memory where there is a GPU, as loader processes leave them."""
    m = size.micro_batch

    def placed(tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if pinned else tensor

    query, key = (placed(torch.randint(0, 256, (m, 3, size.pixels, size.pixels), dtype=torch.uint8)) for _ in range(2))
    labels = placed(torch.randint(0, size.classes, (m,)))
    return MicroBatch(query, key, labels, torch.arange(m), torch.ones(m, dtype=torch.bool))


def figures(size: Size, way: Way) -> tuple[Figures, float]:
    """(of the step, images/s of its encoders alone, run the same way)."""
    ours = Ours(size, way)
    try:
        device, m = ours.ranks.device, size.micro_batch
        found = measure(ours, m, device, warm_up=size.warm_up, steps=size.steps)
        encoders = ours.encoders()
        bare = measure(encoders, m, device, warm_up=min(2, size.warm_up), steps=size.steps, rate_alone=True)
        return found, bare.images_per_second
    finally:
        ours.close()


def main() -> int:
    row = json.loads(sys.argv[1])
    found, bare = figures(Size(**row["size"]), Way(**row["way"]))
    print(json.dumps({"figures": asdict(found), "encoders": bare}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the ranks of the step bench hold: our trainer, or the published loop, on the same shards."""

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from published_step import PublishedStep, full_queue
from ranks import Parts
from report import reset_peak, status_bytes
from torch import Tensor

from paco_ds.config.recipe import Recipe
from paco_ds.data.manifest import open_data
from paco_ds.data.stream.batches import TrainingStream
from paco_ds.distributed.ranks import MicroBatchLayout, Pending, Ranks
from paco_ds.losses.paco import class_prior
from paco_ds.models.output import ModelOutput
from paco_ds.training.build import Classes, build_model, build_stream
from paco_ds.training.trainer import Trainer

WARM_UP = 2  # the first step allocates gradients and momentum, the second is the first that has both from the start
# What the collectives of DeepSpeed, DDP and the rival go through.
COLLECTIVES = [
    name
    for name in (
        "all_reduce",
        "all_gather",
        "all_gather_single",
        "all_gather_into_tensor",
        "reduce_scatter_tensor",
        "reduce_scatter_single",
        "reduce",
        "broadcast",
        "all_to_all_single",
    )
    if hasattr(dist, name)
]


class _Worker:
    """A method's step on this rank, timed."""

    def __init__(self, ranks: Ranks) -> None:
        reset_peak()
        self._before = status_bytes("VmRSS")
        self.ranks, self.parts = ranks, Parts()
        for name in COLLECTIVES:
            self.parts.time(dist, name, "collectives")
        self.parts.time(Pending, "wait", "collectives")

    def warm_up(self) -> tuple[int, list[float]]:
        """Bytes by which resident memory grew, at its peak, since before the model was made; losses of the steps."""
        losses = [self._step() for _ in range(WARM_UP)]
        self.parts.take()
        return status_bytes("VmHWM") - self._before, losses

    def step(self) -> tuple[float, dict[str, float]]:
        """(seconds, seconds by part) of one optimizer step."""
        dist.barrier()
        began = time.perf_counter()
        self._step()
        return time.perf_counter() - began, self.parts.take()

    def _step(self) -> float:
        raise NotImplementedError


class Ours(_Worker):
    """The trainer itself, as `paco_ds/train.py` runs it."""

    def __init__(self, ranks: Ranks, recipe: Recipe, folder: Path) -> None:
        super().__init__(ranks)
        self.trainer = trainer = Trainer(recipe, folder, ranks)
        step = trainer.step
        assert step.contrast is not None
        queue, key_encoder = step.contrast.queue, step.contrast.key_encoder
        queue.push(*full_queue(recipe, len(trainer.manifest.classes)))
        module = step.engine.module
        self._views = torch.randint(0, 256, (2, *trainer_batch(recipe)), dtype=torch.uint8)
        with torch.no_grad():
            self._seeds = [torch.randn_like(t) for t in _rows(module(self._views[0]))]
        time_part = self.parts.time
        trainer.images._stream = _Timed(trainer.stream, self.parts)
        time_part(key_encoder, "update", "EMA")
        time_part(key_encoder, "keys", "key forward")
        time_part(step.engine, "forward", lambda images, keys=False: "key forward" if keys else "query forward")
        time_part(step.forward, "run_loss", "loss")
        time_part(queue, "snapshot", "loss")
        time_part(queue, "push", "loss")
        time_part(step.engine, "backward", "backward")
        time_part(step.engine, "allreduce_gradients", "collectives")
        time_part(step.engine, "step", "optimizer")

    def _step(self) -> float:
        return self.trainer.train_step().loss

    def encoders(self) -> tuple[float, dict[str, float]]:
        """(seconds, {}) of the encoders' own forward and backward, without anything around them: the floor."""
        module = self.trainer.engine.module
        dist.barrier()
        began = time.perf_counter()
        module(self._views[1], keys=True)
        torch.autograd.backward(_rows(module(self._views[0])), self._seeds)
        seconds = time.perf_counter() - began
        module.zero_grad(set_to_none=True)
        return seconds, {}


class Rival(_Worker):
    """The published loop, fed by our stream."""

    def __init__(self, ranks: Ranks, recipe: Recipe, folder: Path) -> None:
        super().__init__(ranks)
        manifest = open_data(recipe.data, {recipe.data.train_split})
        layout = MicroBatchLayout(recipe.step.micro_batch, recipe.step.micro_batches, ranks.rank, ranks.world_size)
        self.stream = _Timed(build_stream(recipe, manifest, layout), self.parts)
        classes = Classes.of(manifest, recipe.data.train_split)
        model, prior = build_model(recipe, classes), class_prior(classes.counts)
        self.loop = PublishedStep(model, recipe, prior, *full_queue(recipe, len(classes.counts)), self.parts)
        self.parts.time(self.loop.model, "_sync_buffers", "collectives")

    def _step(self) -> float:
        (micro_batch,) = next(self.stream)
        loss = torch.tensor(self.loop(micro_batch))
        return float(loss)


def _rows(output: ModelOutput) -> list[Tensor]:
    """What the loss sends gradients to."""
    assert output.queries is not None
    return [output.logits, output.queries]


def trainer_batch(recipe: Recipe) -> tuple[int, int, int, int]:
    """Shape of a micro-batch's images."""
    return recipe.step.micro_batch, 3, recipe.views.query.size, recipe.views.query.size


class _Timed:
    """A stream whose waiting is counted as the part `data`."""

    def __init__(self, stream: TrainingStream, parts: Parts) -> None:
        self._stream, self._parts = stream, parts

    def __next__(self) -> Any:
        with self._parts.part("data"):
            return next(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

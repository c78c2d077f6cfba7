"""What the ranks of a pool run in the tests of waits: a step whose operations are counted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paco_ds.distributed.ranks import Ranks
from paco_ds.training.step import Step
from tests.distributed.runs import _change_loss, deepspeed_config, made_micro_batch, make_step
from tests.recipes import tiny_recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "bench"))

from operations import counting


def _beside(owner: Any, name: str, read: Callable[[Any], object]) -> None:
    """Let a method of an object read something of what it returns, before it returns it."""
    method = getattr(owner, name)

    def reading(*given: Any, **options: Any) -> Any:
        result = method(*given, **options)
        read(result)
        return result

    setattr(owner, name, reading)


def _loss_read(step: Step) -> None:
    _change_loss(step, True, lambda loss: loss * (1 if loss.item() else 0))


WAITS: dict[str, Callable[[Any], None]] = {  # at each place that once read, by what it read
    "loss, item": _loss_read,
    "keys finite, bool": lambda step: _beside(step.contrast.key_encoder, "keys", lambda keys: bool(keys.wait().finite)),
    "labels of keys, tolist": lambda step: _beside(
        step.contrast.key_encoder, "keys", lambda keys: keys.wait().labels_G.tolist()
    ),
    "queue, bincount": lambda step: _beside(
        step.contrast.queue, "push", lambda _: step.contrast.queue.labels_K.bincount()
    ),
    "queue, boolean index": lambda step: _beside(
        step.contrast.queue, "push", lambda _: step.contrast.queue.keys_KD[step.contrast.queue.labels_K > 1]
    ),
    "statistics, numpy": lambda step: _beside(step.statistics, "sums", lambda sums: sums.numpy()),
    "gradients, nonzero": lambda step: _beside(
        step.gradients, "finish", lambda _: next(step.engine.module.parameters()).grad.nonzero()
    ),
    "guard, bool": lambda step: _beside(step, "_applied", bool),
    "gradient norm, item": lambda step: _beside(step.optimizer, "_judge", lambda _: step.optimizer.grad_norm.item()),
    "usual norm, item": lambda step: _beside(step.usual_norm, "ratio", lambda ratio: ratio.item()),
    "figures, cpu": lambda step: _beside(step, "_grad_norm", lambda norm: norm.cpu()),
    "labels of queries, tolist": lambda step: _beside(step, "_forward", lambda result: result.labels.tolist()),
}


def host_reads(
    ranks: Ranks, stage: int, overrides: tuple[str, ...] = (), wait: str = "", filled: int = 6
) -> dict[str, int]:
    """How often each place of the code made the host read the device in a step after `filled` others."""
    recipe = tiny_recipe(*overrides)
    step = make_step(ranks, recipe, deepspeed_config(stage, autocast=False))
    batches = [made_micro_batch(recipe, 0, j) for j in step.layout.own]
    for number in range(filled):
        step(number, batches, recipe.lr)
    if wait:
        WAITS[wait](step)
    with counting() as counted:
        images = step.begin_exchange(filled + 1, batches)
        step(filled, batches, recipe.lr)
    if images is not None:
        images.take()
    step.engine.destroy()
    return dict(counted.host_reads)

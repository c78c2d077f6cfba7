"""What the ranks of a pool run in the tests of waits: a step whose operations are counted."""

from __future__ import annotations

import sys
from pathlib import Path

from paco_ds.distributed.ranks import Ranks
from paco_ds.training.step import Step
from tests.distributed.runs import _change_loss, deepspeed_config, made_micro_batch, make_step
from tests.recipes import tiny_recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "bench"))

from operations import counting


def _loss_read(step: Step) -> None:
    _change_loss(step, True, lambda loss: loss * (1 if loss.item() else 0))


def _queue_bincount(step: Step) -> None:
    assert step.contrast is not None
    queue = step.contrast.queue
    push = queue.push
    queue.push = lambda *given: (queue.labels_K.bincount(), push(*given))[1]


def _keys_masked(step: Step) -> None:
    assert step.contrast is not None
    queue = step.contrast.queue
    push = queue.push
    queue.push = lambda *given: (queue.keys_KD[queue.labels_K > 1], push(*given))[1]


WAITS = {"item": _loss_read, "bincount": _queue_bincount, "boolean index": _keys_masked}


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

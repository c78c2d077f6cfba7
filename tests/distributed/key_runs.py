"""What the ranks of a pool run in the tests of the key encoder: its moving average, and the bytes it sends."""

from __future__ import annotations

from typing import Any

import torch

from paco_ds.contrast.key_encoder import key_momentum
from paco_ds.distributed.ranks import ByteCounter, Ranks
from paco_ds.distributed.zero import stage_of, whole_model
from tests.distributed.runs import FAULTS, TOTAL_STEPS, deepspeed_config, made_micro_batch, make_step
from tests.recipes import tiny_recipe

SMALL = ("model.width=2", "step.micro_batch=4")


def moving_average(
    ranks: Ranks,
    stage: int,
    autocast: bool = False,
    zero: dict[str, Any] | None = None,
    overrides: tuple[str, ...] = (),
    fault: str = "",
) -> tuple[float, float]:
    """(largest difference of a key weight to the float64 average of the recorded query weights, largest move).

    At stage 3 the full copies that ranks keep of small parameters are held against it too.
    """
    recipe = tiny_recipe(*SMALL, *overrides)
    step = make_step(ranks, recipe, deepspeed_config(stage, autocast, **(zero or {})))
    weights = dict(whole_model(step.engine))
    assert recipe.key_encoder is not None
    names = [name for name, _ in step.engine.module.key_encoder.named_parameters()]
    start = {name: weights[f"key_encoder.{name}"].double().clone() for name in names}
    average = dict(start)
    for number in range(TOTAL_STEPS):
        if fault:
            FAULTS[fault](step, number == TOTAL_STEPS // 2)
        momentum = key_momentum(recipe.key_encoder, number, TOTAL_STEPS, recipe.step.scale)
        weights = dict(whole_model(step.engine))
        for name in names:
            average[name] = momentum * average[name] + (1 - momentum) * weights[f"query_encoder.{name}"].double()
        result = step(number, [made_micro_batch(recipe, number, j) for j in step.layout.own], recipe.lr)
        assert result.skipped is None
    weights = dict(whole_model(step.engine))
    found = [(name, weights[f"key_encoder.{name}"]) for name in names]
    if stage_of(step.engine) == 3:
        parameters = dict(step.engine.module.key_encoder.named_parameters())
        found += [(name, p.data.view(p.ds_shape)) for name, p in parameters.items() if p.data.numel()]
    step.engine.destroy()
    error = max(float((value.double() - average[name]).abs().max()) for name, value in found)
    return error, max(float((average[name] - start[name]).abs().max()) for name in names)


def key_bytes(ranks: Ranks, overrides: tuple[str, ...], number: int) -> dict[str, int]:
    """Bytes this rank sends to make the keys of step `number`, by collective."""
    recipe = tiny_recipe(*overrides)
    step = make_step(ranks, recipe, deepspeed_config(0, autocast=False))
    batches = [made_micro_batch(recipe, number, j) for j in step.layout.own]
    ranks.on_bytes = counter = ByteCounter()
    exchanged = step.begin_exchange(number, batches)
    assert exchanged is not None
    step.contrast.key_encoder.keys(number, exchanged, [b.labels for b in batches]).wait()
    ranks.on_bytes = ByteCounter()
    step.engine.destroy()
    return dict(counter.sent)


def keys_of_a_step(ranks: Ranks, overrides: tuple[str, ...], number: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and labels of the global batch, as this rank has them."""
    recipe = tiny_recipe(*overrides)
    step = make_step(ranks, recipe, deepspeed_config(0, autocast=False))
    batches = [made_micro_batch(recipe, number, j) for j in step.layout.own]
    exchanged = step.begin_exchange(number, batches)
    assert exchanged is not None
    keys = step.contrast.key_encoder.keys(number, exchanged, [b.labels for b in batches]).wait()
    step.engine.destroy()
    return keys.keys_GD.clone(), keys.labels_G.clone()


def published_key_bytes(ranks: Ranks, overrides: tuple[str, ...]) -> dict[str, int]:
    """Bytes this rank sends where, as published, all ranks gather all images as float32, and then all keys and
    labels: once each for a queue of keys, once more to undo the shuffle of the keys."""
    recipe = tiny_recipe(*overrides)
    own, size = recipe.step.global_batch // ranks.world_size, recipe.views.key.size
    ranks.on_bytes = counter = ByteCounter()
    ranks.gather(torch.zeros(own, 3, size, size))
    images = counter.sent["all_gather"]
    for _ in range(2):
        ranks.gather(torch.zeros(own, recipe.model.key_dim))
    ranks.gather(torch.zeros(own, dtype=torch.int64))
    ranks.on_bytes = ByteCounter()
    return {"images": images, "keys": counter.sent["all_gather"] - images}

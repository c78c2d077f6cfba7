"""What the ranks of a pool run in the tests of whole tensors at each ZeRO stage."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from paco_ds.distributed import zero
from paco_ds.distributed.ranks import Ranks
from tests.distributed.runs import deepspeed_config, made_micro_batch, make_step
from tests.recipes import tiny_recipe


def differences_to_deepspeed(
    ranks: Ranks, stage: int, autocast: bool, offload: dict[str, Any], bucket: int
) -> list[str]:
    """Names of tensors that differ in a bit from what DeepSpeed's call for each gives, after two steps."""
    recipe = tiny_recipe()
    step = make_step(ranks, recipe, deepspeed_config(stage, autocast, **offload))
    for number in range(2):
        step(number, [made_micro_batch(recipe, number, j) for j in step.layout.own], recipe.lr)
    before, zero.BUCKET = zero.BUCKET, bucket
    model, momentum = (dict(whole(step.engine)) for whole in (zero.whole_model, zero.whole_momentum))
    zero.BUCKET = before
    odd = []
    for name, parameter in step.engine.module.named_parameters():
        if not parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
                odd += [] if torch.equal(model[name], parameter) else [f"weight {name}"]
            continue
        if not torch.equal(model[name], safe_get_full_fp32_param(parameter)):
            odd.append(f"weight {name}")
        if not torch.equal(momentum[name], safe_get_full_optimizer_state(parameter, zero.MOMENTUM)):
            odd.append(f"momentum {name}")
    assert any(value.any() for value in momentum.values())
    step.engine.destroy()
    return odd

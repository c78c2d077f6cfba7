"""Read and set full weights and momentum at any ZeRO stage; moving average of partitioned weights.

Stage 0 partitions nothing; stages 1 and 2 partition the optimizer's state; stage 3 partitions weights too.
Two of the calls used here are private to DeepSpeed; tests/distributed pins them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from torch import Tensor
from torch.nn import Parameter

MOMENTUM = "momentum_buffer"  # torch.optim.SGD's name


def stage_of(engine: Any) -> int:
    return int(engine.zero_optimization_stage())


def whole_model(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every weight, float32, and buffer; a collective: all ranks must iterate over it.

    Buffers, and at stage 0 weights too, are those that training changes: copy what is to be kept.
    """
    yield from engine.module.named_buffers()
    for name, parameter in engine.module.named_parameters():
        weight = safe_get_full_fp32_param(parameter) if _partitioned(engine, parameter) else None
        if weight is None and stage_of(engine) == 3:
            with deepspeed.zero.GatheredParameters([parameter]):
                weight = parameter.detach().clone()
        yield name, (parameter if weight is None else weight).detach().float()


def whole_momentum(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, momentum) of every trained parameter; zeros before the first step. A collective; copy what is to be kept,
    as of `whole_model`."""
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if stage_of(engine) == 0:
            momentum = engine.optimizer.state[parameter].get(MOMENTUM)
        else:
            _make_momentum(engine)
            momentum = safe_get_full_optimizer_state(parameter, MOMENTUM)
        shape = getattr(parameter, "ds_shape", parameter.shape)
        yield name, torch.zeros(shape) if momentum is None else momentum.detach().view(shape)


def set_momentum(engine: Any, momentum: Mapping[str, Tensor]) -> None:
    """Set full momentum buffers, as `whole_momentum` gave them at any stage and world size."""
    _make_momentum(engine)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if stage_of(engine) == 0:
            engine.optimizer.state[parameter][MOMENTUM] = momentum[name].to(parameter.device).clone()
        elif stage_of(engine) == 3:
            safe_set_local_optimizer_state(
                parameter, _own_partition(parameter, momentum[name].to(engine.device)), MOMENTUM
            )
        else:
            safe_set_full_optimizer_state(parameter, momentum[name].to(engine.device), MOMENTUM)


@torch.no_grad()
def move_average(engine: Any, key: Sequence[Parameter], query: Sequence[Parameter], weight: float) -> None:
    """key <- key + weight (query - key), in float32, on the part of the parameters that this rank holds.

    At stage 3 small parameters (all BatchNorm) also keep a full copy on every rank, which is updated too; on one rank
    the copy may be the same memory.
    """
    if stage_of(engine) < 3:
        torch._foreach_lerp_([k.data for k in key], [q.data for q in query], weight)
        return
    torch._foreach_lerp_([k.ds_tensor for k in key], [q.ds_tensor for q in query], weight)  # type: ignore[attr-defined]
    copies = [
        (k.data, q.data)
        for k, q in zip(key, query, strict=True)
        if k.data.numel() and k.data.data_ptr() != k.ds_tensor.data_ptr()  # type: ignore[attr-defined]
    ]
    if copies:
        torch._foreach_lerp_([k for k, _ in copies], [q for _, q in copies], weight)


def _partitioned(engine: Any, parameter: Parameter) -> bool:
    return stage_of(engine) > 0 and parameter.requires_grad


def _own_partition(parameter: Any, whole: Tensor) -> Tensor:
    """This rank's part of a whole tensor at stage 3, padded with zeros like the parameter's. DeepSpeed's own call for
    whole tensors ends with an error on the last rank where their length is no multiple of the ranks (0.19.8)."""
    size = parameter.ds_tensor.numel()
    begin = size * torch.distributed.get_rank(parameter.ds_process_group)
    part = whole.flatten()[begin : begin + size]
    return torch.nn.functional.pad(part, (0, size - len(part)))


def _make_momentum(engine: Any) -> None:
    """SGD has no momentum before its first step; ZeRO reads and writes only what exists."""
    stage = stage_of(engine)
    if stage == 0:
        return
    base = engine.optimizer.optimizer
    if stage == 3:
        flat = engine.optimizer.fp32_partitioned_groups_flat
    else:
        flat = [p for group in base.param_groups for p in group["params"]]
    for partition in flat:
        if MOMENTUM not in base.state[partition]:
            base.state[partition][MOMENTUM] = torch.zeros_like(partition)
    if stage < 3:
        engine.optimizer._lazy_init_hp_params_optimizer_state()

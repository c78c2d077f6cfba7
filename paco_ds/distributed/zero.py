"""Read and set full weights and momentum at any ZeRO stage; moving average of partitioned weights.

Stage 0 partitions nothing; stages 1 and 2 partition the optimizer's state; stage 3 partitions weights too. Whole
tensors are gathered in few large collectives, since a call for each tensor would take most of the time of a save. Some
names used here are private to DeepSpeed; tests/distributed pins them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from torch import Tensor
from torch.nn import Parameter

from paco_ds.distributed.ranks import all_gather

MOMENTUM = "momentum_buffer"  # torch.optim.SGD's name
BUCKET = 2**23  # elements of a rank in one collective, 32 MiB


def stage_of(engine: Any) -> int:
    return int(engine.zero_optimization_stage())


def whole_model(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every weight, float32, and buffer; a collective: all ranks must iterate over it.

    Buffers, and below stage 3 weights too, are those that training changes: copy what is to be kept.
    """
    yield from engine.module.named_buffers()
    named = engine.module.named_parameters()
    if stage_of(engine) < 3:
        yield from ((name, parameter.detach().float()) for name, parameter in named)
        return
    # frozen weights and those of the key encoder are not the optimizer's
    yield from _gathered((n, p, safe_get_local_fp32_param(p) if p.requires_grad else p.ds_tensor) for n, p in named)


def whole_momentum(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, momentum) of every trained parameter; zeros before the first step. A collective; copy what is to be kept,
    as of `whole_model`."""
    trained = [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]
    _make_momentum(engine)
    if stage_of(engine) == 0:
        for name, parameter in trained:
            momentum = engine.optimizer.state[parameter].get(MOMENTUM)
            yield name, torch.zeros(parameter.shape) if momentum is None else momentum.detach()
    elif stage_of(engine) == 3:
        yield from _gathered((n, p, safe_get_local_optimizer_state(p, MOMENTUM)) for n, p in trained)
    else:
        yield from _gathered_flat(engine.optimizer, trained)


def _gathered_flat(zero: Any, trained: Sequence[tuple[str, Parameter]]) -> Iterator[tuple[str, Tensor]]:
    """(name, momentum) at stages 1 and 2, where a group's tensors lie one after another in a flat one."""
    groups = (zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets)
    places = {
        parameter: (number, begin)
        for number, group in enumerate(zip(*groups, strict=True))
        for parameter, begin in zip(*group, strict=True)
    }
    partitions = zip(zero.single_partition_of_fp32_groups, zero.real_dp_process_group, strict=True)
    flats = [_gather_parts(zero.optimizer.state[mine][MOMENTUM], group).flatten() for mine, group in partitions]
    for name, parameter in trained:
        number, begin = places[parameter]
        yield name, flats[number].narrow(0, begin, parameter.numel()).view(parameter.shape)


def _gathered(parts: Iterable[tuple[str, Any, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of (name, parameter, this rank's part), at stage 3; many in one collective."""
    bucket: list[tuple[str, Any, Tensor]] = []
    for part in parts:
        bucket.append(part)
        if sum(mine.numel() for *_, mine in bucket) >= BUCKET:
            yield from _gathered_bucket(bucket)
            bucket = []
    if bucket:
        yield from _gathered_bucket(bucket)


def _gathered_bucket(bucket: Sequence[tuple[str, Any, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    parts_WN = _gather_parts(torch.cat([mine.flatten() for *_, mine in bucket]), bucket[0][1].ds_process_group)
    begin = 0
    for name, parameter, mine in bucket:
        end = begin + mine.numel()
        yield name, parts_WN[:, begin:end].flatten()[: parameter.ds_numel].view(parameter.ds_shape)
        begin = end


def _gather_parts(mine_N: Tensor, group: Any) -> Tensor:
    """Parts of all ranks [W, N] float32, on the device of the job."""
    mine_N = mine_N.detach().float().to(get_accelerator().current_device_name())
    parts_WN = mine_N.new_empty((torch.distributed.get_world_size(group), mine_N.numel()))
    all_gather(parts_WN.view(-1), mine_N, group=group)
    return parts_WN


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

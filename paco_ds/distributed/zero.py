"""Read and set full weights and the optimizer's states at any ZeRO stage; moving average of partitioned weights.

Stage 0 partitions nothing; stages 1 and 2 partition the optimizer's state; stage 3 partitions weights too.
Some of the names used here are private to DeepSpeed; tests/distributed pins them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from paco_ds.distributed.load_deepspeed import (
    deepspeed,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from paco_ds.distributed.parts import Part

Held = TypeVar("Held", Tensor, Part)  # whole, or what this rank has of it
STEP = "step"  # the state in which torch's optimizers count their steps


def stage_of(engine: Any) -> int:
    return int(engine.zero_optimization_stage())


def whole_model(engine: Any, leave_out: Callable[[str], bool] = lambda name: False) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every weight, float32, and buffer; a collective: all ranks must iterate over it.

    Tables that a network makes itself, such as the positions in a window of Swin, are no part of its state dict, nor of
    this. Buffers, and below stage 3 weights too, are those that training changes: copy what is to be kept.

    Args:
        leave_out: asked for the name of each weight, the same on all ranks.
    """
    return _model(engine, leave_out, _whole_weight)


def whole_states(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """(STATE.PARAMETER, tensor) of every state that the optimizer keeps of a trained parameter, float32, as
    `momentum_buffer.centers.weight`; zeros before the first step; and ("step", their number) of an optimizer that
    counts the steps it applied. A collective; copy what is to be kept, as of `whole_model`."""
    return _states(engine, _whole_state)


def own_model(
    engine: Any, leave_out: Callable[[str], bool] = lambda name: False
) -> Iterator[tuple[str, Tensor | Part]]:
    """As `whole_model`, but at stage 3 (name, this rank's part) of weights; no collective."""
    return _model(engine, leave_out, _own_weight)


def own_states(engine: Any) -> Iterator[tuple[str, Tensor | Part]]:
    """As `whole_states`, but (name, this rank's part) where ZeRO partitions them; no collective."""
    return _states(engine, _own_state)


def plain_states(optimizer: Any, model: Module) -> Iterator[tuple[str, Tensor]]:
    """As `whole_states`, of a `GuardedOptimizer` of a model that nothing partitions."""
    trained = _trained(model)
    for _, parameter in trained:
        optimizer.begin(parameter)
    for name, parameter in trained:
        yield from ((f"{state}.{name}", optimizer.state[parameter][state]) for state in optimizer.states_of(parameter))
    if steps := [optimizer.state[parameter][STEP] for _, parameter in trained if STEP in optimizer.state[parameter]]:
        yield STEP, steps[0]


def set_states(engine: Any, states: Mapping[str, Tensor]) -> None:
    """Set all states of the optimizer, as `whole_states` gave them at any stage and world size."""
    begin_states(engine)
    base = _base(engine)
    for name, parameter in _trained(engine.module):
        for state in base.states_of(parameter):
            whole = states[f"{state}.{name}"].to(engine.device)
            if stage_of(engine) == 0:
                base.state[parameter][state].copy_(whole)
            elif stage_of(engine) == 3:
                safe_set_local_optimizer_state(parameter, _own_partition(parameter, whole), state)
            else:
                safe_set_full_optimizer_state(parameter, whole, state)
    for partition in _partitions(engine):
        if STEP in base.state[partition]:
            base.state[partition][STEP].copy_(states[STEP])


def begin_states(engine: Any) -> None:
    """Make the states before the first step, which are zero: ZeRO reads and writes only what exists."""
    base = _base(engine)
    for partition in _partitions(engine):
        base.begin(partition)
    if stage_of(engine) in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


@torch.no_grad()
def move_average(engine: Any, key: Sequence[Parameter], query: Sequence[Parameter], weight: float) -> None:
    """key <- key + weight (query - key), in float32, on the part of the parameters that this rank holds.

    At stage 3 small parameters (all BatchNorm) also keep a full copy on every rank, which is updated too; on one rank
    the copy may be the same memory. Where the query encoder has none, as after an evaluation, the copy is dropped, and
    gathered at its next use.
    """
    if stage_of(engine) < 3:
        torch._foreach_lerp_([k.data for k in key], [q.data for q in query], weight)
        return
    torch._foreach_lerp_([k.ds_tensor for k in key], [q.ds_tensor for q in query], weight)  # type: ignore[attr-defined]
    copies = [(k, q) for k, q in zip(key, query, strict=True) if _has_copy(k)]
    for k, _ in (pair for pair in copies if not pair[1].data.numel()):
        k.partition()  # type: ignore[attr-defined]
    if kept := [(k.data, q.data) for k, q in copies if q.data.numel()]:
        torch._foreach_lerp_([k for k, _ in kept], [q for _, q in kept], weight)


def _has_copy(parameter: Any) -> bool:
    return bool(parameter.data.numel()) and parameter.data.data_ptr() != parameter.ds_tensor.data_ptr()


def _model(
    engine: Any, leave_out: Callable[[str], bool], weight_of: Callable[[Any], Held]
) -> Iterator[tuple[str, Tensor | Held]]:
    kept = engine.module.state_dict(keep_vars=True).keys()
    yield from ((name, buffer) for name, buffer in engine.module.named_buffers() if name in kept)
    for name, parameter in engine.module.named_parameters():
        if not leave_out(name):
            # below stage 3 float32 on every rank, what the optimizer's part was copied to
            yield name, parameter.detach().float() if stage_of(engine) < 3 else weight_of(parameter)


def _states(engine: Any, state_of: Callable[[Any, str], Held]) -> Iterator[tuple[str, Tensor | Held]]:
    base = _base(engine)
    if stage_of(engine) == 0:
        yield from plain_states(base, engine.module)
        return
    begin_states(engine)
    for name, parameter in _trained(engine.module):
        yield from ((f"{state}.{name}", state_of(parameter, state)) for state in base.states_of(parameter))
    if STEP in (counted := base.state[_partitions(engine)[0]]):
        yield STEP, counted[STEP]


def _whole_weight(parameter: Any) -> Tensor:
    if parameter.requires_grad:
        whole: Tensor = safe_get_full_fp32_param(parameter)
    else:
        with deepspeed.zero.GatheredParameters([parameter]):
            whole = parameter.detach().clone()
    return whole.detach().float()


def _whole_state(parameter: Any, state: str) -> Tensor:
    whole: Tensor = safe_get_full_optimizer_state(parameter, state)
    return whole.detach().view(getattr(parameter, "ds_shape", parameter.shape))


def _own_weight(parameter: Any) -> Part:
    trained = parameter.requires_grad
    return _part(parameter, safe_get_local_fp32_param(parameter) if trained else parameter.ds_tensor)


def _own_state(parameter: Any, state: str) -> Part:
    if hasattr(parameter, "ds_id"):  # stage 3
        return _part(parameter, safe_get_local_optimizer_state(parameter, state))
    return _fragment(parameter, state)


def _part(parameter: Any, partition: Tensor) -> Part:
    """This rank's part of a parameter, or of a state of it, at stage 3, without the padding of the last rank."""
    shape, flat = torch.Size(parameter.ds_shape), partition.detach().flatten().float()
    start = min(len(flat) * torch.distributed.get_rank(parameter.ds_process_group), shape.numel())
    return Part(flat[: shape.numel() - start], start, shape)


def _fragment(parameter: Any, state: str) -> Part:
    """This rank's part of a state of a parameter at stages 1 and 2: the optimizer's flat groups are cut into a part for
    each rank wherever that falls."""
    held = parameter._hp_mapping
    if held is None:
        return Part(torch.empty(0), 0, parameter.shape)
    return Part(held.get_hp_fragment(state).detach().flatten(), held.lp_fragment_address.start, parameter.shape)


def _own_partition(parameter: Any, whole: Tensor) -> Tensor:
    """This rank's part of a whole tensor at stage 3, padded with zeros like the parameter's. DeepSpeed's own call for
    whole tensors ends with an error on the last rank where their length is no multiple of the ranks (0.19.8)."""
    size = parameter.ds_tensor.numel()
    begin = size * torch.distributed.get_rank(parameter.ds_process_group)
    part = whole.flatten()[begin : begin + size]
    return torch.nn.functional.pad(part, (0, size - len(part)))


def _trained(model: Module) -> list[tuple[str, Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _base(engine: Any) -> Any:
    """The `GuardedOptimizer` inside."""
    return engine.optimizer if stage_of(engine) == 0 else engine.optimizer.optimizer


def _partitions(engine: Any) -> list[Tensor]:
    """What the optimizer updates on this rank: the trained parameters, or from stage 1 on flat parts of its groups."""
    if stage_of(engine) == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [p for group in _base(engine).param_groups for p in group["params"]]

"""Execution of the model: memory format, activation checkpointing, compilation.

None changes losses or weights beyond rounding, so a resumed run may switch them.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from paco_ds.config.recipe import EngineSettings
from paco_ds.errors import RecipeError
from paco_ds.models.backbones import Backbone
from paco_ds.models.recogniser import Recogniser


def prepare(model: Recogniser, settings: EngineSettings, stage: int) -> None:
    """Apply `engine.channels_last`, `engine.activation_checkpointing` and `engine.compile` to a model, in place.

    Names and shapes of parameters and buffers stay the same.

    Raises:
        RecipeError: `engine.compile` at ZeRO stage 3, or activation checkpointing of a backbone that has none.
    """
    if settings.compile and stage == 3:
        raise RecipeError(
            "engine.compile: ZeRO stage 3 gathers and frees the weights of each layer from outside the compiled code, "
            "which does not support it; set engine.compile=false, or engine.deepspeed to a file of stage 0, 1 or 2"
        )
    if settings.channels_last:
        # Weights keep their format: ZeRO lays them out flat, and convolutions follow the format of the images.
        model.normalize.memory_format = torch.channels_last
    if settings.activation_checkpointing:
        # Keys carry no gradient: the key encoder saves no activations.
        _checkpoint_activations(model.query_encoder.backbone)
    if settings.compile:
        model.query_encoder.compile()
        if model.key_encoder is not None:
            model.key_encoder.compile()


def _checkpoint_activations(backbone: Backbone) -> None:
    """Of timm's networks by their own switch, of others by residual blocks."""
    checkpoint_all = backbone.family.checkpoint if backbone.family else None
    if checkpoint_all is not None and checkpoint_all(backbone):
        for norm in _batch_norms(backbone):
            norm.forward = types.MethodType(_averaged_once, norm)  # type: ignore[method-assign]
        return
    blocks = backbone.blocks()
    if not blocks:
        raise RecipeError(
            "engine.activation_checkpointing: this backbone names no blocks to run again in backward, as ResNets and "
            "most of timm's networks do; set it to false, or take another model.backbone"
        )
    for block in blocks:
        block.forward = types.MethodType(_recomputed_in_backward, block)


def _averaged_once(norm: nn.modules.batchnorm._BatchNorm, *inputs: Tensor) -> Tensor:
    """A BatchNorm's forward, which leaves running statistics alone where it is run again during backward."""
    recomputes = torch._C._current_graph_task_id() != -1
    with _statistics_left_alone(norm) if recomputes else nullcontext():
        normalised: Tensor = type(norm).forward(norm, *inputs)
    return normalised


def _batch_norms(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def _recomputed_in_backward(block: nn.Module, images: Tensor) -> Tensor:
    """The block's forward, keeping only its input for backward."""
    forward = type(block).forward
    if not torch.is_grad_enabled():
        return forward(block, images)
    return checkpoint(forward, block, images, use_reentrant=False, context_fn=partial(_contexts, block))


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of the forward, and of its recomputation during backward."""
    return nullcontext(), _statistics_left_alone(block)


@contextmanager
def _statistics_left_alone(block: nn.Module) -> Iterator[None]:
    """BatchNorm normalises as before but keeps its running statistics, which were updated by the first forward.

    Momentum 0 keeps running statistics unchanged. Disabling them would save other tensors than the forward did, which
    checkpointing refuses.
    """
    norms = _batch_norms(block)
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked

"""Execution of the model: precision, memory format, recomputation, compilation, and what `auto` is on which hardware.

None changes losses or weights beyond rounding, so a resumed run may switch them.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from paco_ds.config.engine import EngineSettings
from paco_ds.errors import RecipeError
from paco_ds.models.backbones import Backbone
from paco_ds.models.recogniser import Recogniser


@dataclass(frozen=True)
class Hardware:
    """What ranks compute on.

    Attributes:
        device: "cpu" or "cuda".
        capability: compute capability of a GPU, such as (9, 0); None on CPU.
        memory: bytes of a GPU; None on CPU, or where it is not known.
    """

    device: str = "cpu"
    capability: tuple[int, int] | None = None
    memory: int | None = None

    @classmethod
    def of(cls, device: torch.device) -> Hardware:
        """That of a rank's device."""
        if device.type != "cuda":
            return cls(device.type)
        properties = torch.cuda.get_device_properties(device)
        return cls("cuda", (properties.major, properties.minor), properties.total_memory)

    @classmethod
    def least(cls, every: Sequence[Hardware]) -> Hardware:
        """What all of them have: ranks compute alike."""
        first = every[0]
        if first.capability is None:
            return first
        memory = [each.memory for each in every if each.memory is not None]
        return cls(first.device, min(each.capability or (0, 0) for each in every), min(memory, default=None))

    def has(self, major: int) -> bool:
        """Whether it is a GPU of this compute capability or above."""
        return self.capability is not None and self.capability >= (major, 0)


def choose(settings: EngineSettings, hardware: Hardware, autocast: bool | None = None) -> EngineSettings:
    """The settings with each `auto` decided, and what the hardware cannot do replaced; `deepspeed` is left as it is.
    Settings that were chosen before stay.

    Args:
        autocast: what `precision: auto` keeps to: the DeepSpeed JSON's `torch_autocast`, or the precision of the
            checkpoint that a run resumes from; None: the hardware decides.

    Raises:
        RecipeError: `precision: published` of a recipe that has none.
    """
    precision = settings.precision
    if precision == "published":
        if settings.published_precision is None:
            raise RecipeError(
                "engine.precision: this recipe has no published precision (engine.published_precision); "
                "choose auto, float32 or bfloat16"
            )
        precision = "float32" if settings.published_precision == "float32" else "bfloat16"
    if precision == "auto":
        precision = "bfloat16" if (hardware.has(8) if autocast is None else autocast) else "float32"
    cuda = hardware.device == "cuda"
    layout, tf32, mode = settings.channels_last, settings.tf32, settings.compile
    return settings.model_copy(
        update={
            "precision": precision,
            "channels_last": hardware.has(7) if layout == "auto" else layout,
            "tf32": cuda and (precision == "bfloat16" if tf32 == "auto" else tf32),
            "compile": "default" if mode == "reduce-overhead" and not cuda else mode,
        }
    )


def choose_kernels(settings: EngineSettings) -> None:
    """Let cuDNN time its kernels for each size, since those of training do not change, and convolutions use TF32 where
    `engine.tf32` says so. For this process; no effect on CPU."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = settings.tf32 is True


def prepare(model: Recogniser, settings: EngineSettings, stage: int) -> None:
    """Apply `engine.channels_last`, `engine.activation_checkpointing` and `engine.compile` to a model, in place.

    Names and shapes of parameters and buffers stay the same.

    Args:
        settings: as `choose` returned them.

    Raises:
        RecipeError: `engine.compile` at ZeRO stage 3, or activation checkpointing of a backbone that has none.
    """
    if settings.compile and stage == 3:
        raise RecipeError(
            "engine.compile: ZeRO stage 3 gathers and frees the weights of each layer from outside the compiled code, "
            "which does not support it; set engine.compile=false, or engine.deepspeed to a file of stage 0, 1 or 2"
        )
    if settings.channels_last is True:
        # Weights keep their format: ZeRO lays them out flat, and convolutions follow the format of the images.
        model.normalize.memory_format = torch.channels_last
    if settings.activation_checkpointing:
        # Keys carry no gradient: the key encoder saves no activations.
        _checkpoint_activations(model.query_encoder.backbone)
    if settings.compile:
        for encoder in filter(None, (model.query_encoder, model.key_encoder)):
            _compile(encoder, settings.compile)
    if settings.compile == "reduce-overhead":
        _keep_beyond_graphs(model)


def _compile(encoder: nn.Module, mode: str) -> None:
    """A graph is recorded for each size, and code for any size cannot be."""
    if mode == "reduce-overhead":
        encoder.compile(mode=mode, dynamic=False)
    else:
        encoder.compile()


def _keep_beyond_graphs(model: Recogniser) -> None:
    """Copy what outlives a replay: CUDA graphs write each result to the same memory.

    Keys of one group wait for those of the next, and gradients for those of the next micro-batch.
    """

    def copy_keys(module: nn.Module, inputs: Any, options: dict[str, Any], output: Any) -> Any:
        return output.clone() if options.get("keys") else output

    model.register_forward_hook(copy_keys, with_kwargs=True)
    for parameter in model.query_encoder.parameters():
        if parameter.requires_grad:
            parameter.register_hook(torch.clone)


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

"""One micro-batch run without numbers: the model on the meta device, its steps on fake tensors, every byte seen.

Nothing is guessed from the architecture: a forward, its loss and its backward are run on tensors that have shapes and
dtypes but no memory; what autograd saves is read from its hooks, what lives when from the operations.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paco_ds.config.optimizer import OptimizerSettings
from paco_ds.config.recipe import Recipe
from paco_ds.contrast.key_encoder import groups_of_keys
from paco_ds.contrast.key_queue import QueueSnapshot
from paco_ds.data.stream.views.device_operations import OPERATIONS
from paco_ds.data.stream.views.device_sampling import sampled
from paco_ds.data.stream.views.instructions import Kind
from paco_ds.losses import make_loss
from paco_ds.losses.base import Loss
from paco_ds.models.execution import prepare
from paco_ds.models.recogniser import Recogniser, split_experts
from paco_ds.training.batch_norm import RunningStatistics
from paco_ds.training.build import Classes, build_model
from paco_ds.training.forward import Forward
from paco_ds.training.parameter_groups import hidden_matrices, parameter_groups


@dataclass(frozen=True)
class StepTrace:
    """Bytes of one micro-batch on one rank; float32 weights.

    Attributes:
        trained: elements of each trained parameter (query encoder, centers), in the order of the model.
        followed: elements of each parameter of the key encoder.
        states: elements of the optimizer's states of whole weights.
        buffers: bytes of the model's buffers.
        statistics: elements of the running statistics that ranks average.
        saved: what autograd keeps from forward to backward, weights and queue left out, each storage once; float
            casts of weights under autocast are part of it.
        logits: the part of `saved` that the loss adds (center logits, their softmax, contrasts).
        key_peak: the most that lives while keys are made.
        peak: the most that lives in forward, loss and backward, gradients of weights counted only while they are
            handed over.
        peak_with_gradients: the same while gradients of weights are kept as they come.
        loss_parts: scalars that the loss is logged by.
        views_peak: the most that lives while both views of a micro-batch are rendered on the device, from parts of
            twice their side; 0 where loader processes make them.
        shuffles_keys: whether key images are shuffled between micro-batches; False without a key encoder.
    """

    trained: tuple[int, ...]
    followed: tuple[int, ...]
    states: int
    buffers: int
    statistics: int
    saved: int
    logits: int
    key_peak: int
    peak: int
    peak_with_gradients: int
    loss_parts: int = 0
    views_peak: int = 0
    shuffles_keys: bool = False


def trace_step(recipe: Recipe, class_counts: tuple[int, ...], autocast: bool) -> StepTrace:
    """Run one micro-batch of a recipe on fake tensors. Takes seconds, and no memory to speak of."""
    with torch.device("meta"):
        model = build_model(recipe, Classes(class_counts, ()))
    # as the engine does; what compiled code saves is only known when it runs
    prepare(model, recipe.engine.model_copy(update={"compile": False}), stage=0)
    parameter_groups(model, recipe.optimizer)  # refused here as by a training
    trained = [p for p in model.parameters() if p.requires_grad]
    followed = [p for p in model.parameters() if not p.requires_grad]
    sizes: dict[str, Any] = {
        "trained": tuple(p.numel() for p in trained),
        "followed": tuple(p.numel() for p in followed),
        "states": _states(model, recipe.optimizer),
        "buffers": sum(b.nbytes for b in model.buffers()),
        "statistics": RunningStatistics(model).flat.numel(),
    }
    loss = make_loss(recipe.loss, class_counts)
    sizes["loss_parts"] = len(loss.part_names) + (recipe.loss.distill is not None)
    if recipe.key_encoder is not None and model.key_encoder is not None:
        sizes["shuffles_keys"] = groups_of_keys(recipe.key_encoder, model.key_encoder) == "shuffle"
    if recipe.views.device == "accelerator":
        sizes["views_peak"] = views_peak(len(recipe.training_views) * recipe.step.micro_batch, recipe.views.query.size)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, loss = model.to_empty(device="cpu"), loss.to_empty(device="cpu")
        size = recipe.views.query.size
        images = torch.empty(recipe.step.micro_batch, 3, size, size, dtype=torch.uint8)
        queue = None
        if recipe.keys_from:
            queue = _full_queue(recipe.queue.length, recipe.model.key_dim, len(class_counts))
        forward = Forward(model, loss, two_views=recipe.runs_both_views)
        parts: dict[str, Any] = _run(forward, model, loss, images, queue, recipe.model.experts, autocast)
    return StepTrace(**sizes, **parts)


def _states(model: Recogniser, settings: OptimizerSettings) -> int:
    matrices = hidden_matrices(model)
    trained = ((name, p.numel()) for name, p in model.named_parameters() if p.requires_grad)
    return sum(numbers * settings.states_of(matrix=name in matrices) for name, numbers in trained)


def views_peak(count: int, size: int) -> int:
    """The most bytes that live while so many views are rendered on a device, none of it in memory here.

    Their parts have twice the side of a view, the most that a loader process leaves of a whole image; each view meets
    the operation that takes most, and a blur.
    """
    side, meta = 2 * size, torch.device("meta")
    lengths = np.full((count, 2), side)
    with LiveBytes([]) as live:
        pixels = torch.empty(3 * count * side**2, dtype=torch.uint8, device=meta)
        starts, sides = (torch.empty(shape, dtype=torch.int32, device=meta) for shape in ((count,), (count, 2)))
        axes, numbers = (torch.empty(count, *shape, device=meta) for shape in ((2, 3), (11,)))
        views = sampled(pixels, starts, sides, axes, lengths, size, cubic=False)
        for kind in (Kind.MATRIX, Kind.BLUR):
            views = OPERATIONS[kind](views, numbers, torch.empty(0, 256, dtype=torch.uint8, device=meta))
    return live.peak


def _full_queue(length: int, dim: int, classes: int) -> QueueSnapshot:
    return QueueSnapshot(
        torch.empty(length, dim),
        torch.zeros(length, dtype=torch.int64),
        class_count_C=torch.zeros(classes, dtype=torch.int64),
        present_sum_RD=torch.empty(min(classes, length) + 1, dim),
        row_C=torch.zeros(classes, dtype=torch.int64),
        version=None,
    )


def _run(
    forward: Forward,
    model: Recogniser,
    loss: Loss,
    images: Tensor,
    queue: QueueSnapshot | None,
    experts: int | None,
    autocast: bool,
) -> dict[str, Any]:
    labels = torch.zeros(len(images), dtype=torch.int64)
    keys = None
    if queue is not None and model.key_encoder is not None:
        keys = torch.empty(len(images), queue.keys_ND.shape[1])
    held = [*model.parameters(), *model.buffers(), *loss.buffers(), images, labels]
    held += [t for t in (keys, *(vars(queue).values() if queue else ())) if t is not None]
    live = LiveBytes(held)
    cast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast)
    found = {"key_peak": 0}
    with live:
        if model.key_encoder is not None:
            with cast:
                model(images, keys=True)
            found["key_peak"] = live.peak
            live.restart()
        with torch.autograd.graph.saved_tensors_hooks(live.save, lambda tensor: tensor):
            with cast:
                result = forward.run_model(images, images, labels)
            in_model = live.saved
            if experts is not None and queue is not None:
                keys, queue = None if keys is None else split_experts(keys, experts), queue.experts(experts)
            output = forward.run_loss(result, keys, queue).loss
            found |= {"saved": live.saved, "logits": live.saved - in_model}
        del result
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(live.hand_over_gradient)
        output.backward()
    return found | {"peak": live.peak, "peak_with_gradients": live.peak_with_gradients}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make while it is entered, for as long as they live.

    Args:
        held: tensors that are there anyway and are not counted.
    """

    def __init__(self, held: list[Tensor]) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {t.untyped_storage()._cdata: 0 for t in held}
        self._held = held  # keeps those storages, and with them their names, alive
        self._saved: dict[int, int] = {}
        self.live = self.peak = self.handed_over = self.peak_with_gradients = 0

    def restart(self) -> None:
        """Begin a new peak."""
        self.peak = self.live

    @property
    def saved(self) -> int:
        """Bytes saved for backward so far, each storage once."""
        return sum(self._saved.values())

    def save(self, tensor: Tensor) -> Tensor:
        """The pack hook of autograd."""
        name = tensor.untyped_storage()._cdata
        self._saved[name] = self._sizes.get(name, tensor.untyped_storage().nbytes())
        return tensor

    def hand_over_gradient(self, parameter: Tensor) -> None:
        """A gradient goes to whoever collects them."""
        if parameter.grad is not None:
            self.handed_over += parameter.grad.nbytes
            parameter.grad = None
            self._look()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        name = storage._cdata
        if name not in self._sizes:
            self._sizes[name] = storage.nbytes()
            self.live += storage.nbytes()
            weakref.finalize(storage, self._drop, name)
            self._look()

    def _drop(self, name: int) -> None:
        self.live -= self._sizes.pop(name)

    def _look(self) -> None:
        self.peak = max(self.peak, self.live)
        self.peak_with_gradients = max(self.peak_with_gradients, self.live + self.handed_over)

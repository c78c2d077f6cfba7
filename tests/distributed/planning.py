"""What the ranks of a pool run to check a plan: memory that a real step takes, bytes that it hands to collectives."""

from __future__ import annotations

import ctypes
import gc
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paco_ds.config.recipe import Recipe
from paco_ds.data.stream.batches import MicroBatch
from paco_ds.distributed.ranks import Ranks
from paco_ds.models.backbones import make_backbone
from paco_ds.models.families import ImageSizes
from paco_ds.training.step import Step
from tests.distributed.runs import deepspeed_config, made_micro_batch, make_step
from tests.recipes import tiny_recipe
from tests.resident import reset_peak, status_bytes

M_MMAP_THRESHOLD = -3


def growth(
    ranks: Ranks,
    overrides: tuple[str, ...],
    stage: int,
    autocast: bool = False,
    zero: dict[str, Any] | None = None,
    give_back: bool = True,
) -> int:
    """Peak resident memory over the start while a model is made and takes two steps.

    Args:
        give_back: the allocator returns blocks of a MiB and more when they are freed, as with
            MALLOC_MMAP_THRESHOLD_=1048576. By itself glibc keeps what it likes of them for later.
    """
    config = deepspeed_config(stage, autocast, **(zero or {}))
    recipe = tiny_recipe(*overrides)
    # what a first step loads and starts (kernels, threads, bucket of a first engine) belongs to no plan, and neither
    # does the library of the network: timm takes up to 190 MiB
    _two_steps(ranks, tiny_recipe(), config).engine.destroy()
    with torch.device("meta"):
        make_backbone(recipe.model, ImageSizes.of(recipe.views))
    libc = ctypes.CDLL(None)
    if give_back:
        assert libc.mallopt(M_MMAP_THRESHOLD, 2**20) == 1
    gc.collect()
    libc.malloc_trim(0)
    reset_peak()
    before = status_bytes("VmRSS")
    step = _two_steps(ranks, recipe, config)
    peak = status_bytes("VmHWM") - before
    step.engine.destroy()
    return peak


def allocated(
    ranks: Ranks, overrides: tuple[str, ...], stage: int, autocast: bool = False, zero: dict[str, Any] | None = None
) -> int:
    """Peak of what torch allocates on a GPU over the start while a model is made and takes two steps."""
    config = deepspeed_config(stage, autocast, **(zero or {}))
    # workspaces of cuBLAS, which stay, belong to no plan
    _two_steps(ranks, tiny_recipe(), config).engine.destroy()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step = _two_steps(ranks, tiny_recipe(*overrides), config)
    peak = torch.cuda.max_memory_allocated() - before
    step.engine.destroy()
    return peak


def _two_steps(ranks: Ranks, recipe: Recipe, config: dict[str, Any]) -> Step:
    step = make_step(ranks, recipe, config)
    encoder = step.contrast.key_encoder if step.contrast else None
    ahead = encoder is not None and encoder.exchanges
    batches, images = _made(step, recipe, 0), None
    for number in range(2):
        if ahead:  # the trainer has the next step's images, and key images under way, while a step computes
            following = _made(step, recipe, number + 1)
            arriving = step.begin_exchange(number + 1, following)
            step(number, batches, recipe.lr, images)
            batches, images = following, arriving
        else:
            step(number, _made(step, recipe, number), recipe.lr)
    if images is not None:
        images.take()
    return step


def _made(step: Step, recipe: Recipe, number: int) -> list[MicroBatch]:
    return [made_micro_batch(recipe, number, j) for j in step.layout.own]


def collectives(
    ranks: Ranks,
    overrides: tuple[str, ...],
    stage: int,
    zero: dict[str, Any] | None = None,
    steps: int = 3,
) -> list[dict[str, int]]:
    """Bytes this rank sends in each step, by collective, as torch's own operations show them."""
    recipe = tiny_recipe(*overrides)
    step = make_step(ranks, recipe, deepspeed_config(stage, autocast=False, **(zero or {})))
    sent = []
    for number in range(steps):
        batches = [made_micro_batch(recipe, number, j) for j in step.layout.own]
        with Collectives(ranks.world_size) as seen:
            step(number, batches, recipe.lr)
        sent.append(dict(seen.sent))
    step.engine.destroy()
    return sent


class Collectives(TorchDispatchMode):
    """Counts bytes of c10d operations, whoever calls them, by the convention of `Ranks`."""

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.world_size = world_size
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").strip("_")
            W = self.world_size
            # (output, input, ...) but for those that work in place
            first, second = (sum(_bytes(t) for t in tree_leaves(a)) for a in (args[0], args[1]))
            if "allreduce" in name:
                self.sent["all_reduce"] += 2 * first * (W - 1) // W
            elif "allgather" in name:
                self.sent["all_gather"] += second * (W - 1)
            elif "reduce_scatter" in name:
                self.sent["reduce_scatter"] += first * (W - 1)
            elif "alltoall" not in name:
                self.sent[name] += first
        return func(*args, **(kwargs or {}))


def _bytes(leaf: Any) -> int:
    return leaf.nbytes if isinstance(leaf, Tensor) else 0

"""The plan of a recipe on a number of ranks: memory, traffic and steps, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from paco_ds.config.data import DataSettings, Sampler
from paco_ds.config.recipe import Recipe
from paco_ds.data.manifest import Manifest, load_manifest
from paco_ds.data.storage import open_storage
from paco_ds.data.stream.order import EpochOrder
from paco_ds.data.stream.partition import held_bytes, micro_batches_ahead, shards_at_once
from paco_ds.distributed.ranks import MicroBatchLayout, legal_world_sizes
from paco_ds.errors import DataError, UserError
from paco_ds.models.execution import Hardware, choose
from paco_ds.models.families import ImageSizes
from paco_ds.planning.memory import Device, Memory, plan_memory, zero_settings
from paco_ds.planning.network import connections, open_files
from paco_ds.planning.planned_rank import PlannedRank
from paco_ds.planning.sizes import format_bytes
from paco_ds.planning.trace import StepTrace, trace_step
from paco_ds.planning.traffic import Traffic, plan_traffic
from paco_ds.training.engine import autocast_of, check_stage, read_deepspeed_config, stage_config, stage_in
from paco_ds.training.initial_weights import check_files

STAGES = (0, 1, 2, 3)
OUTSIDE = 2**30  # of a GPU's memory: CUDA context, NCCL, cuDNN; not counted by torch's allocator
GPU_CAPABILITY = (8, 0)  # assumed of the GPUs that a plan is for
MARGIN = 0.15  # relative error of a plan


@dataclass(frozen=True)
class Data:
    """The training images: from a manifest, or as given.

    Attributes:
        shards: samples of each shard; a single one of all images if none are built.
        built: whether shards exist.
        shard_bytes: bytes of each shard; empty if none are built.
        names: of the classes; empty if none are built.
    """

    built: bool
    class_counts: tuple[int, ...]
    shards: tuple[int, ...]
    shard_bytes: tuple[int, ...] = ()
    names: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        return sum(self.shards)


@dataclass(frozen=True)
class Plan:
    """A plan; sizes in bytes, times in seconds.

    Attributes:
        zero: DeepSpeed's settings by ZeRO stage that the optimizer can have: those of the recipe's file at another
            stage, or with `auto` those of the stage's own file.
        memory: by the same stages, with all other settings as in the recipe.
        window_bytes: upper bound on the host memory for windows of a rank, over its loader processes; None without
            shards.
        cache_bytes: needed in data.cache per rank of a host for the shards read at the same time; None without shards.
        ready_bytes: shared host memory for prefetched micro-batches.
        connections: of a rank to others, by purpose.
        open_files: shards that a rank's processes hold open; None without shards.
        verdict: "fits", "tight" (within the plan's margin of 15 %) or "does not fit", at the recipe's stage; None if
            no GPU memory was given.
    """

    recipe: Recipe
    data: Data
    layout: MicroBatchLayout
    device: Device
    stage: int
    autocast: bool
    trace: StepTrace
    zero: dict[int, Any]
    memory: dict[int, Memory]
    traffic: dict[int, list[Traffic]]
    steps_per_epoch: int
    shards_per_rank: int | None
    window_bytes: int | None
    cache_bytes: int | None
    ready_bytes: int
    legal_ranks: tuple[int, ...]
    connections: dict[str, int]
    open_files: int | None
    images_per_second: float | None = None
    gpu_memory: int | None = None
    verdict: str | None = None

    @property
    def seconds_per_epoch(self) -> float | None:
        if self.images_per_second is None:
            return None
        return self.steps_per_epoch * self.layout.global_batch / self.images_per_second


def find_data(settings: DataSettings, images: int | None, classes: int | None) -> Data:
    """The training data of a recipe: from its manifest, or as given if shards are not built yet.

    Raises:
        UserError: only one of the two is given, or fewer images than classes.
        DataError: no manifest, and neither is given.
    """
    if images is None and classes is None:
        try:
            manifest: Manifest = load_manifest(open_storage(settings))
        except DataError as error:
            raise type(error)(f"{error}. To plan without shards give --images N and --classes C") from None
        split = manifest.split(settings.train_split)
        samples, sizes = tuple(s.samples for s in split.shards), tuple(s.bytes for s in split.shards)
        return Data(True, split.class_counts, samples, sizes, tuple(manifest.classes))
    if images is None or classes is None:
        missing = "--images" if images is None else "--classes"
        raise UserError(f"{missing} is missing: planning without shards takes both --images N and --classes C")
    if classes < 1 or images < classes:
        raise UserError(
            f"--images {images} and --classes {classes}: there must be at least one class, and an image of each"
        )
    counts = tuple(images // classes + (label < images % classes) for label in range(classes))
    return Data(False, counts, (images,))


def make_plan(
    recipe: Recipe,
    ranks: int,
    data: Data,
    *,
    gpu_memory: int | None = None,
    images_per_second: float | None = None,
    device: Device = "cuda",
) -> Plan:
    """Plan a recipe on a number of ranks. What it leaves to `auto` is decided as for GPUs of compute capability 8.

    Raises:
        RecipeError: the ranks cannot share the step's micro-batches (the legal numbers are named), the global batch is
            larger than the data set, the DeepSpeed JSON is invalid, or settings of the model do not fit each other or
            the files that they name, where those are there.
        UserError: a figure out of range.
    """
    if ranks < 1:
        raise UserError(f"--ranks {ranks}: there must be at least one")
    if images_per_second is not None and not images_per_second > 0:
        raise UserError(f"--images-per-second {images_per_second:g}: it must be above 0")
    layout = MicroBatchLayout(recipe.step.micro_batch, recipe.step.micro_batches, 0, ranks)
    config = read_deepspeed_config(recipe.engine.deepspeed)
    if recipe.engine.deepspeed != "auto":
        check_stage(recipe.optimizer, stage_in(config))
    hardware = Hardware(device, GPU_CAPABILITY if device == "cuda" else None, gpu_memory)
    recipe = recipe.model_copy(update={"engine": choose(recipe.engine, hardware, autocast_of(config))})
    order = EpochOrder(data.shards, layout.global_batch, seed=recipe.seed, epoch=0, window=recipe.data.window)
    autocast = recipe.engine.precision == "bfloat16"
    trace = trace_step(recipe, data.class_counts, autocast)
    check_files(recipe.model, ImageSizes.of(recipe.views), data.names)
    rank = PlannedRank(recipe, trace, len(data.class_counts), layout)
    auto = recipe.engine.deepspeed == "auto"
    zero = {
        stage: zero_settings(stage_config(stage)) if auto else zero_settings(config, stage)
        for stage in (STAGES if recipe.optimizer.takes_parts else STAGES[:1])
    }
    memory = {s: plan_memory(rank, settings, device) for s, settings in zero.items()}
    stage = int(zero_settings(config).stage)
    if not recipe.optimizer.takes_parts:
        stage = 0
    elif auto and device == "cuda":
        stage = 0 if gpu_memory is None or judge(memory[0].total, gpu_memory, device) == "fits" else 1
    verdict = None if gpu_memory is None else judge(memory[stage].total, gpu_memory, device)
    return Plan(
        recipe=recipe,
        data=data,
        layout=layout,
        device=device,
        stage=stage,
        autocast=autocast,
        trace=trace,
        zero=zero,
        memory=memory,
        traffic={s: plan_traffic(rank, settings) for s, settings in zero.items()},
        steps_per_epoch=order.steps,
        shards_per_rank=_shards_per_rank(data, layout, order.steps, recipe.data.sampler),
        window_bytes=_window_bytes(data, layout, recipe.data.window),
        cache_bytes=_cache_bytes(data, layout, recipe.data.window),
        ready_bytes=_ready_bytes(layout, recipe.data.workers, len(recipe.training_views) * rank.image_bytes),
        legal_ranks=legal_world_sizes(layout.micro_batches),
        connections=connections(rank, device),
        open_files=open_files(data.shards, layout, recipe.data.window, recipe.data.workers) if data.built else None,
        images_per_second=images_per_second,
        gpu_memory=gpu_memory,
        verdict=verdict,
    )


def planned_stage(plan: Plan) -> tuple[int, str]:
    """The ZeRO stage of a plan, and why, on one line."""
    assert plan.gpu_memory is not None
    needed, there = format_bytes(plan.memory[plan.stage].total), format_bytes(plan.gpu_memory)
    options = f"--recipe RECIPE --ranks {plan.layout.world_size} --gpu-memory {there.replace(' ', '')}"
    said = "" if plan.verdict == "fits" else f", {plan.verdict}: see paco-preflight --plan {options}"
    return plan.stage, f"auto: {needed} planned of {there}{said}"


def judge(total: int, gpu_memory: int, device: Device = "cuda") -> str:
    """Whether a plan's bytes fit into a memory; on CUDA `OUTSIDE` bytes of it are not available to torch."""
    there = gpu_memory - (OUTSIDE if device == "cuda" else 0)
    if total > there:
        return "does not fit"
    return "tight" if total * (1 + MARGIN) > there else "fits"


def _shards_per_rank(data: Data, layout: MicroBatchLayout, steps: int, sampler: Sampler) -> int | None:
    """Upper bound on the shards that a rank reads in an epoch: a micro-batch's batch slots are one run of ids, which
    other samplers than the instance-balanced one go through several times."""
    if not data.built:
        return None
    if sampler != "instance_balanced":
        return len(data.shards)
    # a run has the end of a shard, whole ones, of which the smallest are the most, and the beginning of another
    whole = np.searchsorted(np.cumsum(sorted(data.shards)), layout.micro_batch * steps - 2, side="right")
    return min(len(data.shards), layout.accumulation * (int(whole) + 2))


def _window_bytes(data: Data, layout: MicroBatchLayout, window: int) -> int | None:
    return held_bytes(sum(data.shard_bytes) / data.images, layout, window) if data.built else None


def _ready_bytes(layout: MicroBatchLayout, workers: int, image: int) -> int:
    return micro_batches_ahead(layout) * layout.micro_batch * image if workers else 0


def _cache_bytes(data: Data, layout: MicroBatchLayout, window: int) -> int | None:
    if not data.built:
        return None
    shards = shards_at_once(data.shards, layout, window)
    return sum(sorted(data.shard_bytes, reverse=True)[:shards])

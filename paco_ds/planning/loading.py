"""Loader workers that feed the GPUs of a node: images/s of a worker and of a GPU, and whether the cores suffice."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import torch

from paco_ds.config.data import DataSettings
from paco_ds.config.recipe import Recipe
from paco_ds.config.views import TrainView, ViewDevice
from paco_ds.contrast.key_queue import KeyQueue
from paco_ds.data.manifest import Manifest
from paco_ds.data.shard import BadSample, RawSample, ShardReader
from paco_ds.data.stream.views import MakeRawViews, MakeViews, make_view
from paco_ds.errors import DataError, UserError
from paco_ds.losses import make_loss
from paco_ds.models.execution import Hardware, choose, choose_kernels, prepare
from paco_ds.models.recogniser import split_experts
from paco_ds.randomness import DrawPurpose, generator, permutation
from paco_ds.training.build import Classes, build_model
from paco_ds.training.engine import autocast_of, read_deepspeed_config
from paco_ds.training.forward import Forward

HEADROOM = 1.25  # images take turns: a worker that meets large ones must not keep its GPU waiting


@dataclass(frozen=True)
class LoadingPlan:
    """Images/s and workers of one node; `workers` and `configured` are of each GPU's rank."""

    per_worker: float
    per_gpu: float
    measured: bool
    gpus: int
    cores: int
    workers: int
    configured: int

    @property
    def cores_suffice(self) -> bool:
        """Whether each worker gets a core, and each rank another."""
        return self.gpus * (self.workers + 1) <= self.cores

    @property
    def verdict(self) -> str:
        """ "fed", "too few workers" or "too few cores"."""
        if not self.cores_suffice:
            return "too few cores"
        return "fed" if self.configured >= self.workers else "too few workers"

    def lines(self) -> list[str]:
        """The plan in words, remedy last."""
        how = "measured here" if self.measured else "as given"
        lines = [
            f"one worker makes both views of {self.per_worker:.0f} images/s (measured here, from the shards)",
            f"one GPU takes {self.per_gpu:.0f} images/s ({how})",
            f"a GPU needs {self.workers} workers, the node {self.gpus * self.workers} and a core for each of its "
            f"{self.gpus} ranks; this machine has {self.cores} cores",
        ]
        if self.verdict == "too few cores":
            left = max(self.cores // self.gpus - 1, 0) * self.per_worker
            waits = f"waits {1 - left / self.per_gpu:.0%} of the time" if left < self.per_gpu else "waits now and then"
            lines.append(
                f"TOO FEW CORES: their workers make {left:.0f} images/s for each GPU, so it {waits}; use smaller "
                f"images (paco-build-shards build --resize-short), cheaper views, or nodes with more cores for each GPU"
            )
        elif self.verdict == "too few workers":
            lines.append(f"TOO FEW WORKERS: the recipe has {self.configured}; give --set data.workers={self.workers}")
        else:
            lines.append(f"FED: the recipe's data.workers={self.configured} is enough")
        return lines


def plan_loading(per_worker: float, per_gpu: float, gpus: int, configured: int, *, measured: bool) -> LoadingPlan:
    """Workers for rates in images/s.

    Raises:
        UserError: a figure out of range.
    """
    if gpus < 1:
        raise UserError(f"--gpus-per-node {gpus}: there must be at least one")
    if not (per_gpu > 0 and math.isfinite(per_gpu)):
        raise UserError(f"{per_gpu:g} images/s for a GPU: it must be above 0")
    workers = math.ceil(per_gpu * HEADROOM / per_worker)
    return LoadingPlan(per_worker, per_gpu, measured, gpus, len(os.sched_getaffinity(0)), workers, configured)


def measure_loading(
    data: DataSettings,
    views: Sequence[TrainView],
    manifest: Manifest,
    seed: int,
    seconds: float = 3.0,
    *,
    views_on: ViewDevice = "cpu",
) -> float:
    """Training images/s of one process with one thread: read, decoded, views made; samples in random order.

    Args:
        views: of each image, see `Recipe.training_views`.
        views_on: as `views.device`; what a device does is not part of it.

    Raises:
        DataError: no sample can be read.
    """
    with ShardReader(manifest.storage, manifest.split(data.train_split)) as reader:
        order = permutation(len(reader), DrawPurpose.WINDOW, seed)
        rate = loading_rate(lambda n: reader.read(int(order[n % len(order)])), data, views, seed, seconds, views_on)
    if not rate:
        raise DataError(f"no sample of {data.shards} could be read; run paco-build-shards check on it")
    return rate


def loading_rate(
    read: Callable[[int], RawSample],
    data: DataSettings,
    views: Sequence[TrainView],
    seed: int,
    seconds: float,
    views_on: ViewDevice,
) -> float:
    """Images/s of one process with one thread, see `measure_loading`; 0 if no image can be decoded.

    Args:
        read: the sample of each number from 0.
    """
    drawn, size = tuple(map(make_view, views)), views[0].size
    make_views: MakeViews | MakeRawViews = MakeViews(drawn, data.max_pixels)
    if views_on == "accelerator":
        make_views = MakeRawViews(drawn, data.max_pixels, size)
    threads, made = (cv2.getNumThreads(), torch.get_num_threads()), 0

    def load(position: int) -> None:
        nonlocal made
        rngs = (generator(s, seed, 0, position) for s in (DrawPurpose.QUERY_VIEW, DrawPurpose.KEY_VIEW))
        try:
            make_views(read(position), *list(rngs)[: len(views)])
            made += 1
        except BadSample:
            pass

    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    try:
        elapsed = _repeat(load, seconds)
        return made / elapsed
    finally:
        cv2.setNumThreads(threads[0])
        torch.set_num_threads(threads[1])


def measure_step(recipe: Recipe, class_counts: Sequence[int], device: torch.device, seconds: float = 5.0) -> float:
    """Training images/s of one device: keys, queries, loss and backward of micro-batches of random pixels.

    Queue, update and reduction are left out, so a run takes somewhat fewer: workers enough for this are enough.
    """
    m, size = recipe.step.micro_batch, recipe.views.query.size
    model = build_model(recipe, Classes(class_counts, ())).to(device)
    forward = Forward(model, make_loss(recipe.loss, class_counts).to(device), two_views=recipe.runs_both_views)
    said = autocast_of(read_deepspeed_config(recipe.engine.deepspeed))
    execution = choose(recipe.engine, Hardware.of(device), said)
    choose_kernels(execution)
    prepare(model, execution, stage=0)
    autocast = execution.precision == "bfloat16"
    query, key = torch.randint(0, 256, (2, m, 3, size, size), dtype=torch.uint8, device=device)
    labels = torch.randint(0, len(class_counts), (m,), device=device)
    queue = None
    if recipe.keys_from:
        queue = KeyQueue(recipe.step.global_batch, recipe.model.key_dim, device).snapshot(len(class_counts))
        queue = queue if recipe.model.experts is None else queue.experts(recipe.model.experts)

    def step(number: int) -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            keys = None if model.key_encoder is None else split_experts(model(key, keys=True), recipe.model.experts)
            result = forward.run_model(query, key, labels)
        forward.run_loss(result, keys, queue).loss.backward()
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for number in range(3):  # kernels are chosen and memory is taken
        step(number)
    steps = 0

    def counted(number: int) -> None:
        nonlocal steps
        step(number)
        steps += 1

    elapsed = _repeat(counted, seconds)
    return steps * m / elapsed


def _repeat(work: Callable[[int], None], seconds: float) -> float:
    """Call work(0), work(1), ... for about that long, 3 times at least; the seconds that it took."""
    start, number = time.perf_counter(), 0
    while number < 3 or time.perf_counter() - start < seconds:
        work(number)
        number += 1
    return time.perf_counter() - start

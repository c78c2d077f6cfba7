"""Our step on images of the project's own stream, for the GPU bench: synthetic shards, loader processes, views."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from gpu_figures import Figures, measure
from gpu_ours import Ours, Size, Way, joined

from paco_ds.config.load import load_recipe
from paco_ds.config.recipe import Recipe
from paco_ds.data.manifest import load_manifest
from paco_ds.data.pack.build_plan import BuildOptions
from paco_ds.data.pack.card import folder_card
from paco_ds.data.pack.shards import build_shards
from paco_ds.data.stream.batches import MicroBatch
from paco_ds.distributed.ranks import MicroBatchLayout
from paco_ds.training.build import build_stream

IMAGES, DISTINCT, CLASSES = 8192, 128, 10  # photographs of 500 to 800 pixels; repeated, they are decoded all the same


@cache
def shards(dry: bool) -> Path:
    """A folder of synthetic shards, made once and removed at the end of the process."""
    from views import noise, photographs

    folder = Path(tempfile.mkdtemp(prefix="gpu-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    count = 32 if dry else IMAGES
    distinct = noise(4) if dry else photographs(DISTINCT)
    for number in range(count):
        path = folder / "images" / f"class{number % CLASSES}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(distinct[number % len(distinct)].image)
    options = BuildOptions(shard_bytes=(1 if dry else 64) * 2**20)
    build_shards(folder_card(folder / "images"), folder / "images", folder / "shards", options)
    return folder / "shards"


@contextmanager
def streamed(size: Size, views_on: str, *, dry: bool) -> Iterator[Iterator[MicroBatch]]:
    """Micro-batches of the recipe's own views, for the one rank of this process."""
    workers = 0 if dry else min(size.micro_batch, max(1, len(os.sched_getaffinity(0)) - 1))
    recipe = make_recipe(size, shards(dry), workers, views_on)
    layout = MicroBatchLayout(size.micro_batch, 1, 0, 1)
    stream = build_stream(recipe, load_manifest(shards(dry)), layout, 0, joined().device)
    try:
        yield (micro_batch for step in stream for micro_batch in step)
    finally:
        stream.close()


def make_recipe(size: Size, folder: Path, workers: int, views_on: str) -> Recipe:
    """The recipe of ImageNet-LT on these shards."""
    return load_recipe(
        "imagenet_lt_resnet50",
        (
            f"data.shards={folder}",
            f"data.workers={workers}",
            f"step.micro_batch={size.micro_batch}",
            "step.micro_batches=1",
            f"views.device={views_on}",
            *(f"views.{view}.size={size.pixels}" for view in ("query", "key", "evaluation")),
        ),
    )


def figures(size: Size, way: Way, views_on: str, *, dry: bool) -> tuple[Figures, str]:
    """(of the step, what it waited for the stream in words)."""
    device = joined().device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with streamed(size, views_on, dry=dry) as batches:
        ours = Ours(size, way, batches)
        try:
            found = measure(ours, size.micro_batch, device, warm_up=size.warm_up, steps=size.steps)
        finally:
            ours.close()
    cores = len(os.sched_getaffinity(0))
    return found, f"of JPEGs, {cores} cores"

"""Views rendered on a GPU against those rendered on the CPU. Not run where there is no GPU."""

import pytest
import torch

from paco_ds.data.manifest import load_manifest
from paco_ds.data.stream.views import RawView, raw_batch, render
from paco_ds.data.stream.views.instructions import instruction
from paco_ds.distributed.ranks import MicroBatchLayout
from paco_ds.training.build import build_stream
from tests.data.test_views_on_device import OPERATIONS, PHOTOGRAPHS, Box, flat
from tests.recipes import tiny_recipe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("tf32", [False, True])
def test_each_operation_is_that_of_the_cpu(tf32):
    """Integer arithmetic is the same, also where float32 is rounded for tensor cores; affine transforms round."""
    patch = Box(31, 52, 300, 410, 427, 640, 96).patch(PHOTOGRAPHS[0])
    raws = [RawView(patch, (instruction(operation, 96),)) for operation in OPERATIONS]
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        ours = render(flat(raws).pin_memory(), raw_batch(raws), 96, torch.device("cuda")).cpu()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    theirs = render(flat(raws), raw_batch(raws), 96, torch.device("cpu"))
    off = (ours.int() - theirs.int()).abs()
    assert off.float().mean() < 0.01
    for operation, of_one in zip(OPERATIONS, off, strict=True):
        assert of_one.float().mean() < 0.1, operation


def test_the_stream_renders_on_the_gpu_without_a_wait(striped_shards):
    """Batches are there already, equal to the CPU's but for rounding."""
    recipe = tiny_recipe("views.device=accelerator", "schedule.epochs=1")
    cuda, cpu = (
        build_stream(recipe, load_manifest(striped_shards), MicroBatchLayout(8, 4, 0, 1), 0, torch.device(device))
        for device in ("cuda", "cpu")
    )
    next(cuda), next(cpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = next(cuda)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for batch, expected in zip(ours, next(cpu), strict=True):
        assert batch.query.is_cuda
        assert (batch.query.cpu().int() - expected.query.int()).abs().float().mean() < 0.05

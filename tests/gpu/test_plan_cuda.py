"""A plan against what torch allocates on a GPU over two real steps. Not run where there is no GPU."""

import pytest
import torch

from tests.distributed.test_plan import LARGE, OFFLOAD, RECOMPUTED, SMALL_BUCKET, check_memory

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_planned_memory_is_within_15_percent_of_what_torch_allocates(cuda_rank, stage):
    """ResNet-18, two micro-batches a step; DeepSpeed's default bucket of 2 GB would hide every other part."""
    check_memory(cuda_rank, stage, LARGE, zero=SMALL_BUCKET, device="cuda")


@pytest.mark.parametrize(("overrides", "autocast"), [(LARGE, True), (RECOMPUTED, False), (RECOMPUTED, True)])
def test_so_it_is_with_autocast_and_with_activation_checkpointing(cuda_rank, overrides, autocast):
    """Each, and both."""
    check_memory(cuda_rank, 1, overrides, autocast, SMALL_BUCKET, "cuda")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_offloaded_optimizer_is_not_on_the_gpu(cuda_rank, stage):
    """Momentum, the own weights' copy and the own gradients."""
    check_memory(cuda_rank, stage, LARGE, zero=SMALL_BUCKET | OFFLOAD, device="cuda")

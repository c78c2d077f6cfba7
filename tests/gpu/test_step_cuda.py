"""The step on one CUDA rank against the plain loop on the CPU. Not run where there is no GPU."""

import pytest
import torch

from tests.distributed.test_step import STEPS, check, reference
from tests.models.tiny_networks import of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TF32 = {"loss": 1e-2, "update": 0.2}  # cuDNN convolutions round their inputs to 10 bits


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_step_on_cuda_is_that_of_the_plain_loop(cuda_rank, stage):
    """NCCL, device tensors and the CUDA path of the queue's attention, by the same code as on the CPU."""
    (outcome,) = cuda_rank.run("tests.distributed.runs:run_steps", stage=stage, steps=STEPS)
    check(outcome, reference(), TF32)


@pytest.mark.parametrize("fault", ["keys", "loss", "gradient"])
def test_the_guard_holds_on_cuda(cuda_rank, fault):
    """What is not finite changes nothing."""
    arguments = {"stage": 1, "fault": fault, "fault_rank": 0}
    ((before, after, later),) = cuda_rank.run("tests.distributed.runs:state_around_a_fault", **arguments)
    assert (after.skipped, later.skipped) == ([fault], [None])
    for name, value in before.after.items():
        assert "key_encoder" in name or torch.equal(value, after.after[name]), name


def test_a_network_without_batch_norm_takes_steps_on_cuda(cuda_rank):
    """Its running statistics are none, on the device all the same."""
    overrides = (*of("vit"), "loss.method=cross_entropy")
    (outcome,) = cuda_rank.run("tests.distributed.runs:run_steps", overrides=overrides, steps=STEPS)
    assert outcome.skipped == [None] * STEPS

"""What a step sums over its micro-batches and ranks lies on the device."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from paco_ds.distributed.ranks import Ranks
from paco_ds.losses.base import LossOutput
from paco_ds.training.batch_norm import RunningStatistics
from paco_ds.training.totals import StepTotals

META = torch.device("meta")


@pytest.mark.parametrize("layer", [nn.Linear, nn.BatchNorm1d])
def test_the_sums_are_on_the_device_with_and_without_batch_norm(layer):
    """Fake tensors of a device without memory refuse one of the host among them, as CUDA's do."""
    arguments = (2, 2) if layer is nn.Linear else (2,)
    with FakeTensorMode(allow_non_fake_inputs=True):
        statistics = RunningStatistics(layer(*arguments, device=META), META)
        statistics.begin_step()
        statistics.begin_micro_batch()
        statistics.end_micro_batch()
        totals = StepTotals(torch.eye(3, dtype=torch.float64, device=META))
        totals.add(LossOutput(torch.zeros((), device=META)), torch.zeros(2, dtype=torch.int64, device=META))
        totals.begin_sum(Ranks(0, 1, 0, META), statistics.sums())
        assert totals.finite().device == META

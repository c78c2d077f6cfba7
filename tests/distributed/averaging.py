"""What the ranks of a pool run in the tests of gradients averaged in buckets."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paco_ds.distributed.ranks import Ranks
from paco_ds.training.gradients import GradientMean


def means(ranks: Ranks, bucket_bytes: int, bfloat16: bool) -> tuple[list[Tensor], list[Tensor], int]:
    """(gradients after two backwards of which the second is the last, the mean of the ranks' own, buckets)."""
    model = nn.Sequential(nn.Linear(7, 30), nn.ReLU(), nn.Linear(30, 40), nn.Linear(40, 3))
    model.append(nn.Linear(5, 5))  # of no use here: its gradients are 0
    for number, parameter in enumerate(model.parameters()):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    mean = GradientMean(list(model.parameters()), ranks, dtype, bucket_bytes)
    generator = torch.Generator().manual_seed(100 + ranks.rank)
    for last in (False, True):
        if last:
            mean.begin()
        model[:4](torch.randn(9, 7, generator=generator)).square().sum().backward()
    own = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    mean.finish()
    expected = [ranks.sum(gradient) / ranks.world_size for gradient in own]
    return [p.grad for p in model.parameters() if p.grad is not None], expected, len(mean._buckets)

"""Experts of RIDE (Wang et al. 2021): one network that branches into several before its last two stages.

Experts share the stem and the first stages; each has its own last stages, with all or three quarters of the channels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Width = Literal["full", "reduced"]


class Experts(nn.Module):
    """[B, 3, H, W] -> the experts' pooled features [E, B, feature_dim]."""

    def __init__(self, shared: nn.Module, experts: list[nn.Module], feature_dim: int) -> None:
        super().__init__()
        self.shared, self.experts, self.feature_dim = shared, nn.ModuleList(experts), feature_dim

    def forward(self, images: Tensor) -> Tensor:
        common = self.shared(images)
        return torch.stack([self.feature(e, common) for e in range(len(self.experts))])

    def feature(self, e: int, common: Tensor) -> Tensor:
        """Pooled feature [B, feature_dim] of expert `e`, from 0, from the output of the shared stages."""
        pooled: Tensor = self.experts[e](common).mean((2, 3))
        return pooled


def he_initialise(module: nn.Module) -> None:
    """He initialisation of every convolution, as ResNets are published."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")

"""Experts of RIDE (Wang et al. 2021): one network that branches into several before its last stages.

Experts share the stem and the first stages; each has its own last stages. ResNets are built anew from the stage before
the last but one, with all or three quarters of the channels. Networks of timm whose stages lie in a row are cut:
`FirstStages` and `LastStages` keep the names that tensors have in the whole network, see `whole_name`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor, nn

Width = Literal["full", "reduced"]
_CUT = re.compile(r"(?:shared|experts\.\d+)\.whole\.")


class Experts(nn.Module):
    """[B, 3, H, W] -> the experts' pooled features [E, B, feature_dim].

    Args:
        experts: each from the output of `shared` to pooled features.
    """

    def __init__(self, shared: nn.Module, experts: list[nn.Module], feature_dim: int) -> None:
        super().__init__()
        self.shared, self.experts, self.feature_dim = shared, nn.ModuleList(experts), feature_dim

    def forward(self, images: Tensor) -> Tensor:
        common = self.shared(images)
        return torch.stack([self.feature(e, common) for e in range(len(self.experts))])

    def feature(self, e: int, common: Tensor) -> Tensor:
        """Pooled feature [B, feature_dim] of expert `e`, from 0, from the output of the shared stages."""
        pooled: Tensor = self.experts[e](common)
        return pooled


class MeanOverPixels(nn.Module):
    """[B, F, H, W] -> [B, F]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class FirstStages(nn.Module):
    """A network of timm up to one of its stages: images to the output of the stage before.

    Args:
        whole: cut in place.
        stages: name of its row of stages.
        count: how many of them.
        dropped: names of its parts after the stages.
    """

    def __init__(self, whole: Any, stages: str, count: int, dropped: Collection[str]) -> None:
        super().__init__()
        self.whole = whole
        setattr(whole, stages, getattr(whole, stages)[:count])  # a slice keeps the names of the stages
        for name in dropped:
            setattr(whole, name, nn.Identity())

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.whole.forward_features(images)
        return x


def whole_name(name: str) -> str:
    """The name that a tensor of cut stages has in the whole network; any other name unchanged."""
    return _CUT.sub("", name, count=1)


def he_initialise(module: nn.Module) -> None:
    """He initialisation of every convolution, as ResNets are published."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")

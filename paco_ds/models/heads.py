"""Heads on the pooled feature: the projection that contrasts use and the normalisation before the backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn


class Projection(nn.Sequential):
    """The published heads, [B, feature_dim] -> [B, dim], not normalised.

    "two_layer" is PaCo's Linear-BatchNorm-ReLU-Linear, "three_layer" GPaCo's Linear-ReLU-Linear-ReLU-Linear.
    """

    def __init__(
        self, feature_dim: int, hidden: int, dim: int, kind: Literal["two_layer", "three_layer"] = "two_layer"
    ) -> None:
        if kind == "two_layer":
            inner: list[nn.Module] = [nn.BatchNorm1d(hidden), nn.ReLU()]
        else:
            inner = [nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
        super().__init__(nn.Linear(feature_dim, hidden), *inner, nn.Linear(hidden, dim))


class Normalize(nn.Module):
    """uint8 images [B, 3, H, W] to float32 with the data set's channel mean and deviation (of the 0-1 range).

    `memory_format` is that of the result; what follows keeps it.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.memory_format = torch.contiguous_format
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, 255 * torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images.contiguous(memory_format=self.memory_format).float() - self.mean) / self.std

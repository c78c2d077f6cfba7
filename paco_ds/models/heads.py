"""Heads on the pooled feature: the projection that contrasts use and the normalisation before the backbone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Projection(nn.Sequential):
    """Linear-BatchNorm-ReLU-Linear, as published: [B, feature_dim] -> [B, dim], not normalised."""

    def __init__(self, feature_dim: int, hidden: int, dim: int) -> None:
        super().__init__(nn.Linear(feature_dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, dim))


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

"""Heads on the pooled feature: projection and centers, of one network or of experts, and the normalisation before.

Shapes: E experts, B images, F feature dimension, D dimension of a projection, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Projection(nn.Sequential):
    """The published heads, [B, feature_dim] -> [B, dim], not normalised.

    "two_layer" is PaCo's Linear-BatchNorm-ReLU-Linear, "three_layer" GPaCo's Linear-ReLU-Linear-ReLU-Linear; of GPaCo's
    ViTs with "gelu".
    """

    def __init__(
        self,
        feature_dim: int,
        hidden: int,
        dim: int,
        kind: Literal["two_layer", "three_layer"] = "two_layer",
        activation: Literal["relu", "gelu"] = "relu",
    ) -> None:
        act = {"relu": nn.ReLU, "gelu": nn.GELU}[activation]
        if kind == "two_layer":
            inner: list[nn.Module] = [nn.BatchNorm1d(hidden), act()]
        else:
            inner = [act(), nn.Linear(hidden, hidden), act()]
        super().__init__(nn.Linear(feature_dim, hidden), *inner, nn.Linear(hidden, dim))


class LinearCenters(nn.Linear):
    """A linear classifier, [B, F] -> [B, C]; with `rows` also a copy of its centers [C, F].

    The forward returns the copy, since ZeRO-3 gathers weights only while it runs.
    """

    def forward(self, feature_BF: Tensor, rows: bool = False) -> Any:
        logits = super().forward(feature_BF)
        return (logits, self.weight.clone()) if rows else logits


class CosineCenters(nn.Module):
    """scale x cosine of feature and center, [B, F] -> [B, C], no bias, as in LDAM (Cao et al. 2019) and RIDE.

    Args:
        scale: s, 30 in both papers.
    """

    def __init__(self, feature_dim: int, classes: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, feature_dim))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.out_features, self.scale = classes, scale

    def forward(self, feature_BF: Tensor, rows: bool = False) -> Any:
        """Like :class:`LinearCenters`."""
        logits = self.scale * F.normalize(feature_BF.float(), dim=1) @ F.normalize(self.weight, dim=1).T
        return (logits, self.weight.clone()) if rows else logits


class ScaledCenters(nn.Module):
    """Learnable weight scaling (LWS, Kang et al. 2020): a frozen linear classifier whose logits get a trained factor
    each, [B, F] -> [B, C]."""

    def __init__(self, feature_dim: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(feature_dim, classes).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(classes))

    def forward(self, feature_BF: Tensor) -> Tensor:
        return self.scale * self.linear(feature_BF)


class PerExpert(nn.ModuleList):
    """A head for each expert: [E, B, in] -> [E, B, out]."""

    def __init__(self, experts: int, make_head: Callable[[], nn.Module]) -> None:
        super().__init__(make_head() for _ in range(experts))

    def forward(self, features_EBF: Tensor, **options: Any) -> Any:
        """The outputs of the heads, stacked; of heads with several outputs, each stacked separately."""
        outputs = [head(feature, **options) for head, feature in zip(self, features_EBF.unbind(), strict=True)]
        if isinstance(outputs[0], Tensor):
            return torch.stack(outputs)
        return tuple(torch.stack(parts) for parts in zip(*outputs, strict=True))


class Normalize(nn.Module):
    """uint8 images [B, 3, H, W] to float32 with the data set's channel mean and deviation (of the 0-1 range).

    `memory_format` is that of the result; the layers that follow keep it.
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

"""Backbones: images to pooled features. Each returns [B, feature_dim] and says its `feature_dim`."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from paco_ds.recipe import ModelSettings


class Backbone(nn.Module):
    """A network that ends in its pooled feature F(x) [B, feature_dim]."""

    def __init__(self, network: nn.Module, feature_dim: int) -> None:
        super().__init__()
        self.network, self.feature_dim = network, feature_dim

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def blocks(self) -> list[nn.Module]:
        """The residual blocks, in order: the units of which activation checkpointing keeps the input alone."""
        return [m for m in self.modules() if isinstance(m, (BasicBlock, Bottleneck, _BasicBlock))]


def make_backbone(settings: ModelSettings) -> Backbone:
    """The backbone a recipe names, randomly initialised."""
    return _BACKBONES[settings.backbone](settings)


def _torchvision(name: str) -> Callable[[ModelSettings], Backbone]:
    def make(settings: ModelSettings) -> Backbone:
        network = torchvision.models.get_model(name, weights=None)
        feature_dim = network.fc.in_features
        network.fc = nn.Identity()
        return Backbone(network, feature_dim)

    return make


def _cifar(depth: int) -> Callable[[ModelSettings], Backbone]:
    def make(settings: ModelSettings) -> Backbone:
        return Backbone(CifarResNet(depth, settings.width), 4 * settings.width)

    return make


_BACKBONES: dict[str, Callable[[ModelSettings], Backbone]] = {
    "resnet18": _torchvision("resnet18"),
    "resnet50": _torchvision("resnet50"),
    "cifar_resnet20": _cifar(20),
    "cifar_resnet32": _cifar(32),
}


class CifarResNet(nn.Module):
    """The 6n+2-layer ResNet for small images (He et al. 2016, section 4.2), shortcuts without parameters (A).

    Args:
        depth: 6n+2.
        width: channels of the first stage (16 in the paper); the feature has 4 x width.
    """

    def __init__(self, depth: int, width: int = 16) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages, channels = [], width
        for stage in range(3):
            for block in range(blocks):
                out = width * 2**stage
                stages.append(_BasicBlock(channels, out, stride=2 if stage and not block else 1))
                channels = out
        self.blocks = nn.Sequential(*stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks(F.relu(self.bn1(self.conv1(images))))
        return features.mean((2, 3))


class _BasicBlock(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride, self.added = stride, out - channels

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.added:  # shortcut A: every second pixel, new channels are zero
            x = F.pad(
                x[:, :, :: self.stride, :: self.stride],
                (0, 0, 0, 0, self.added // 2, self.added - self.added // 2),
            )
        return F.relu(y + x)

"""Experts of RIDE (Wang et al. 2021): one network that branches into several before its last two stages.

Stem and first stages are shared; each expert has last stages of its own, whole or with three quarters of the channels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from paco_ds.errors import RecipeError
from paco_ds.models.cifar import CifarResNet, cifar_stage, initialise

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
        """[B, feature_dim]: what expert `e`, from 0, makes of what `shared` made of the images. For whoever asks the
        experts one after the other, each about the images that need it."""
        pooled: Tensor = self.experts[e](common).mean((2, 3))
        return pooled


def make_experts(network: nn.Module, name: str, count: int, width: Width) -> Experts:
    """`count` experts of a network, which gives its stem and first stages.

    Raises:
        RecipeError: the network is not a ResNet or ResNeXt of torchvision, or a CIFAR ResNet.
    """
    if isinstance(network, ResNet):
        return _of_torchvision(network, count, width)
    if isinstance(network, CifarResNet):
        return _of_cifar(network, count, width)
    raise RecipeError(
        f"model.experts {count}: {name} has no stages to branch at; experts need a ResNet, ResNeXt or cifar_resnet, or "
        f"leave model.experts out"
    )


def _of_torchvision(network: ResNet, count: int, width: Width) -> Experts:
    block = type(network.layer3[0])
    assert issubclass(block, (BasicBlock, Bottleneck))
    shared = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool, network.layer1, network.layer2)
    channels = 128 * block.expansion
    third, fourth = (256, 512) if width == "full" else (192, 384)

    def expert() -> nn.Module:
        stages = nn.Sequential(
            _stage(block, network, channels, third, len(network.layer3)),
            _stage(block, network, third * block.expansion, fourth, len(network.layer4)),
        )
        initialise(stages)
        return stages

    return Experts(shared, [expert() for _ in range(count)], fourth * block.expansion)


def _stage(
    block: type[BasicBlock | Bottleneck], network: ResNet, channels: int, planes: int, blocks: int
) -> nn.Sequential:
    """torchvision's blocks with the network's groups; the first halves the resolution."""
    out = planes * block.expansion
    downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride=2, bias=False), nn.BatchNorm2d(out))
    grouped = {"groups": network.groups, "base_width": network.base_width}
    return nn.Sequential(
        block(channels, planes, 2, downsample, **grouped), *(block(out, planes, **grouped) for _ in range(blocks - 1))
    )


def _of_cifar(network: CifarResNet, count: int, width: Width) -> Experts:
    base, blocks = network.conv1.out_channels, network.blocks_per_stage
    second, third = (2 * base, 4 * base) if width == "full" else (3 * base // 2, 3 * base)
    shared = nn.Sequential(network.conv1, network.bn1, nn.ReLU(), *network.blocks[:blocks])

    def expert() -> nn.Module:
        stages = nn.Sequential(*cifar_stage(base, second, blocks), *cifar_stage(second, third, blocks))
        initialise(stages)
        return stages

    return Experts(shared, [expert() for _ in range(count)], third)

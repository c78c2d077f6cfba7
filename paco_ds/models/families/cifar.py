"""ResNets for small images: `cifar_resnetN`, with 6n+2 layers."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from paco_ds.config.model import ModelSettings
from paco_ds.errors import RecipeError
from paco_ds.models.experts import Experts, MeanOverPixels, Width, he_initialise
from paco_ds.models.families.base import Family, ImageSizes, Network

_NAME = re.compile(r"cifar_resnet(\d+)")


class CifarResNet(nn.Module):
    """The 6n+2-layer ResNet for small images (He et al. 2016, section 4.2), shortcuts without parameters (A).

    Args:
        depth: 6n+2.
        width: channels of the first stage (16 in the paper); the feature has 4 x width.

    Raises:
        ValueError: a depth that is not 6n+2.
    """

    def __init__(self, depth: int, width: int = 16) -> None:
        super().__init__()
        self.blocks_per_stage, rest = divmod(depth - 2, 6)
        if rest or self.blocks_per_stage < 1:
            raise ValueError(f"a CIFAR ResNet has 6n+2 layers (8, 14, 20, 26, 32, ...), not {depth}")
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            *cifar_stage(width, width, self.blocks_per_stage, stride=1),
            *cifar_stage(width, 2 * width, self.blocks_per_stage),
            *cifar_stage(2 * width, 4 * width, self.blocks_per_stage),
        )
        he_initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks(F.relu(self.bn1(self.conv1(images))))
        return features.mean((2, 3))


def cifar_stage(channels: int, out: int, blocks: int, stride: int = 2) -> list[nn.Module]:
    """The blocks of one stage; the first takes the stride."""
    return [CifarBlock(out if block else channels, out, 1 if block else stride) for block in range(blocks)]


class CifarBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without parameters."""

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
        if self.added or self.stride > 1:  # shortcut A: every second pixel, new channels are zero
            x = F.pad(
                x[:, :, :: self.stride, :: self.stride],
                (0, 0, 0, 0, self.added // 2, self.added - self.added // 2),
            )
        return F.relu(y + x)


def _make(settings: ModelSettings, sizes: ImageSizes) -> Network:
    match = _NAME.fullmatch(settings.backbone)
    assert match is not None
    try:
        return Network(CifarResNet(int(match[1]), settings.width), 4 * settings.width)
    except ValueError as error:
        raise RecipeError(f"model.backbone {settings.backbone}: {error}") from None


def _branch(network: nn.Module, count: int, width: Width, another: Callable[[], nn.Module]) -> Experts | None:
    if not isinstance(network, CifarResNet):
        return None
    base, blocks = network.conv1.out_channels, network.blocks_per_stage
    second, third = (2 * base, 4 * base) if width == "full" else (3 * base // 2, 3 * base)
    shared = nn.Sequential(network.conv1, network.bn1, nn.ReLU(), *network.blocks[:blocks])

    def expert() -> nn.Module:
        stages = nn.Sequential(
            *cifar_stage(base, second, blocks), *cifar_stage(second, third, blocks), MeanOverPixels()
        )
        he_initialise(stages)
        return stages

    return Experts(shared, [expert() for _ in range(count)], third)


FAMILY = Family(
    owns=lambda name: _NAME.fullmatch(name) is not None,
    names=lambda: ("cifar_resnet20", "cifar_resnet32"),
    make=_make,
    blocks=(CifarBlock,),
    branch=_branch,
)

"""ResNets for small images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


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
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks(F.relu(self.bn1(self.conv1(images))))
        return features.mean((2, 3))


def cifar_stage(channels: int, out: int, blocks: int, stride: int = 2) -> list[nn.Module]:
    """The blocks of one stage; the first takes the stride."""
    return [CifarBlock(out if block else channels, out, 1 if block else stride) for block in range(blocks)]


def initialise(module: nn.Module) -> None:
    """He initialisation of every convolution, as both kinds of ResNet are published."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")


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

"""Initial weights as the authors' code draws them, where they differ from torch's and torchvision's."""

from __future__ import annotations

import torch
from torch import nn

from paco_ds.models.families.cifar import CifarBlock
from paco_ds.models.heads import CosineCenters, Projection


@torch.no_grad()
def initialise_as_published(encoder: nn.Module, centers: nn.Module) -> None:
    """Draw again what dvlab-research's and frank-xwang's code draws in another way.

    In CIFAR ResNets `_weights_init` is He's with fan-in, of every convolution and of `fc`, which becomes the last layer
    of the projection. Cosine centers (`NormedLinear`) begin with length 1, in uniform directions of a cube. The large
    ResNets are torchvision's in both.
    """
    if any(isinstance(part, CifarBlock) for part in encoder.modules()):
        for part in encoder.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight)
            elif isinstance(part, Projection):
                last = part[-1]
                assert isinstance(last, nn.Linear)
                nn.init.kaiming_normal_(last.weight)
    for part in centers.modules():
        if isinstance(part, CosineCenters):
            part.weight.uniform_(-1, 1)
            part.weight.div_(part.weight.norm(dim=1, keepdim=True))

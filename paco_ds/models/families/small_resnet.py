"""`resnetN_small`, N 18, 34, 50 or 101: torchvision's ResNets with the stem of SupContrast's and GPaCo's runs on CIFAR.

One 3 x 3 convolution that keeps the resolution, no pooling: 32 pixels reach the last stage as 4 x 4.
"""

from __future__ import annotations

import re

import torchvision
from torch import nn

from paco_ds.config.model import ModelSettings
from paco_ds.models.families.base import Family, ImageSizes, Network

_NAME = re.compile(r"(resnet(?:18|34|50|101))_small")


def _make(settings: ModelSettings, sizes: ImageSizes) -> Network:
    match = _NAME.fullmatch(settings.backbone)
    assert match is not None
    network = torchvision.models.get_model(match[1], weights=None)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    dim = int(network.fc.in_features)
    network.fc = nn.Identity()
    return Network(network, dim)


# blocks and experts are torchvision's, which recognises its ResNets by class
FAMILY = Family(
    owns=lambda name: _NAME.fullmatch(name) is not None,
    names=lambda: ("resnet18_small", "resnet34_small", "resnet50_small", "resnet101_small"),
    make=_make,
)

"""Any classifier of torchvision by its name (`resnet152`), and two ResNets of the paper without a name there."""

from __future__ import annotations

import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from paco_ds.config.recipe import ModelSettings
from paco_ds.errors import RecipeError
from paco_ds.models.experts import Experts, Width, he_initialise
from paco_ds.models.families.base import Family

# Blocks of each stage, groups, width of a group; torchvision has the blocks.
_COMPOSED = {
    "resnet200": ([3, 24, 36, 3], 1, 64),
    "resnext101_32x4d": ([3, 4, 23, 3], 32, 4),
}


def _names() -> list[str]:
    return [*torchvision.models.list_models(module=torchvision.models), *_COMPOSED]


def _make(settings: ModelSettings) -> tuple[nn.Module, int]:
    name = settings.backbone
    if name in _COMPOSED:
        layers, groups, width = _COMPOSED[name]
        network: nn.Module = ResNet(Bottleneck, layers, groups=groups, width_per_group=width)
    else:
        network = torchvision.models.get_model(name, weights=None)
    return network, _take_classifier(network, name)


def _take_classifier(network: nn.Module, name: str) -> int:
    """Replace the classifier of 1000 classes by nothing, and return the dimension of what it was given."""
    found = [(path, m) for path, m in network.named_modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    if len(found) != 1:
        raise RecipeError(
            f"model.backbone {name} has {len(found)} linear classifiers where one is needed: choose another network"
        )
    path, classifier = found[0]
    network.set_submodule(path, nn.Identity())
    return int(classifier.in_features)


def _branch(network: nn.Module, count: int, width: Width) -> Experts | None:
    if not isinstance(network, ResNet):
        return None
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
        he_initialise(stages)
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


FAMILY = Family(
    owns=lambda name: name in _names(),
    names=_names,
    make=_make,
    blocks=(BasicBlock, Bottleneck),
    branch=_branch,
)

"""Any classifier of torchvision by its name (`resnet152`), and two ResNets of the paper without a name there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

from paco_ds.config.model import ModelSettings
from paco_ds.errors import RecipeError
from paco_ds.models.experts import Experts, MeanOverPixels, Width, he_initialise
from paco_ds.models.families.base import Family, ImageSizes, Network

# Blocks of each stage, groups, width of a group; torchvision has the blocks.
_COMPOSED = {
    "resnet200": ([3, 24, 36, 3], 1, 64),
    "resnext101_32x4d": ([3, 4, 23, 3], 32, 4),
}


def _names() -> list[str]:
    return [*torchvision.models.list_models(module=torchvision.models), *_COMPOSED]


def _make(settings: ModelSettings, sizes: ImageSizes) -> Network:
    name = settings.backbone
    arguments = _of_vit(name, sizes) if name.startswith("vit_") else {}
    if name in _COMPOSED:
        layers, groups, width = _COMPOSED[name]
        network: nn.Module = ResNet(Bottleneck, layers, groups=groups, width_per_group=width)
    else:
        network = torchvision.models.get_model(name, weights=None, **arguments)
    return Network(network, _take_classifier(network, name), arguments)


def _of_vit(name: str, sizes: ImageSizes) -> dict[str, Any]:
    """The size of the images, on which the position embeddings of a ViT depend.

    Raises:
        RecipeError: patches do not divide it, or evaluation has another.
    """
    patch = int(name.rpartition("_")[2])
    if sizes.training % patch:
        raise RecipeError(
            f"views.query.size {sizes.training}: the patches of {name} have {patch} pixels a side, which do not divide "
            f"it; set a multiple of {patch}"
        )
    if sizes.evaluation != sizes.training:
        raise RecipeError(
            f"views.evaluation.size {sizes.evaluation}: {name} has position embeddings for the {sizes.training} pixels "
            f"of views.query.size alone; set both equal, or take timm's network with model.kwargs.dynamic_img_size=true"
        )
    return {"image_size": sizes.training}


def _adapt(tensors: dict[str, Tensor], network: nn.Module) -> Mapping[str, Tensor]:
    if isinstance(network, VisionTransformer):
        resampled: Mapping[str, Tensor] = interpolate_embeddings(network.image_size, network.patch_size, tensors)
        return resampled
    return tensors


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


def _branch(network: nn.Module, count: int, width: Width, another: Callable[[], nn.Module]) -> Experts | None:
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
            MeanOverPixels(),
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
    adapt=_adapt,
)

"""Backbones by name: images to pooled features [B, feature_dim], or [E, B, feature_dim] of experts.

A name is one of ours (`cifar_resnet32`, `resnet200`, `resnext101_32x4d`), any classifier of torchvision
(`resnet152`), or `timm:NAME` where timm is installed.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from typing import Any

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from paco_ds.config.recipe import ModelSettings
from paco_ds.errors import RecipeError
from paco_ds.models.cifar import CifarBlock, CifarResNet
from paco_ds.models.experts import make_experts

# ResNets of the paper that torchvision has the blocks for, but no name: blocks of each stage, groups, width of a group.
_COMPOSED = {
    "resnet200": ([3, 24, 36, 3], 1, 64),
    "resnext101_32x4d": ([3, 4, 23, 3], 32, 4),
}
_CIFAR = re.compile(r"cifar_resnet(\d+)")


class Backbone(nn.Module):
    """A network that ends in its pooled feature F(x): [B, feature_dim], or [E, B, feature_dim] of experts."""

    def __init__(self, network: nn.Module, feature_dim: int) -> None:
        super().__init__()
        self.network, self.feature_dim = network, feature_dim

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def blocks(self) -> list[nn.Module]:
        """The residual blocks, in order: the units of which activation checkpointing keeps the input alone."""
        return [m for m in self.modules() if isinstance(m, (BasicBlock, Bottleneck, CifarBlock))]


def make_backbone(settings: ModelSettings) -> Backbone:
    """The backbone a recipe names, randomly initialised.

    Raises:
        RecipeError: a name that is not known, a network without one linear classifier at its end, or experts of a
            network that has no stages to branch at.
    """
    network, feature_dim = _make_network(settings)
    if settings.experts is not None:
        experts = make_experts(network, settings.backbone, settings.experts, settings.expert_width)
        return Backbone(experts, experts.feature_dim)
    return Backbone(network, feature_dim)


def _make_network(settings: ModelSettings) -> tuple[nn.Module, int]:
    """(network without its classifier, dimension of its feature)."""
    name = settings.backbone
    if cifar := _CIFAR.fullmatch(name):
        try:
            return CifarResNet(int(cifar[1]), settings.width), 4 * settings.width
        except ValueError as error:
            raise RecipeError(f"model.backbone {name}: {error}") from None
    if name.startswith("timm:"):
        return _of_timm(name.removeprefix("timm:"))
    if name in _COMPOSED:
        layers, groups, width = _COMPOSED[name]
        network: nn.Module = ResNet(Bottleneck, layers, groups=groups, width_per_group=width)
    elif name in (known := torchvision.models.list_models(module=torchvision.models)):
        network = torchvision.models.get_model(name, weights=None)
    else:
        names = [*known, *_COMPOSED, "cifar_resnet20", "cifar_resnet32"]
        near = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see docs/methods.md for the names"
        raise RecipeError(f"model.backbone {name!r} is not known; {hint}")
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


def _of_timm(name: str) -> tuple[nn.Module, int]:
    if importlib.util.find_spec("timm") is None:
        raise RecipeError(f"model.backbone timm:{name} needs timm: pip install timm")
    import timm

    if name not in timm.list_models():
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise RecipeError(f"model.backbone timm:{name} is not one of timm's; did you mean {' or '.join(near)}?")
    network: Any = timm.create_model(name, pretrained=False, num_classes=0)
    return network, int(network.num_features)

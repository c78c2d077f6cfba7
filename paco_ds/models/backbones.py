"""Backbones by name: images to pooled features [B, feature_dim], or [E, B, feature_dim] of experts.

A name belongs to a family (`paco_ds.models.families`), or is `module:function` of code from outside the package.
"""

from __future__ import annotations

import difflib

from torch import Tensor, nn

from paco_ds.config.plugins import is_plugin, load_plugin
from paco_ds.config.recipe import ModelSettings
from paco_ds.errors import RecipeError
from paco_ds.models.families import families


class Backbone(nn.Module):
    """A network that ends in its pooled feature F(x): [B, feature_dim], or [E, B, feature_dim] of experts."""

    def __init__(self, network: nn.Module, feature_dim: int) -> None:
        super().__init__()
        self.network, self.feature_dim = network, feature_dim

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def blocks(self) -> list[nn.Module]:
        """The residual blocks, in order: the units of which activation checkpointing keeps the input alone."""
        kinds = tuple(kind for family in families() for kind in family.blocks)
        return [m for m in self.modules() if isinstance(m, kinds)]


def make_backbone(settings: ModelSettings) -> Backbone:
    """The backbone a recipe names, randomly initialised.

    Raises:
        RecipeError: an unknown name, a network without one linear classifier at its end, or experts of a network that
            has no stages to branch at.
    """
    network, feature_dim = _make_network(settings)
    if settings.experts is None:
        return Backbone(network, feature_dim)
    for family in families():
        experts = family.branch and family.branch(network, settings.experts, settings.expert_width)
        if experts is not None:
            return Backbone(experts, experts.feature_dim)
    raise RecipeError(
        f"model.experts {settings.experts}: {settings.backbone} has no stages to branch at; experts need a ResNet, "
        f"ResNeXt or cifar_resnet, or leave model.experts out"
    )


def _make_network(settings: ModelSettings) -> tuple[nn.Module, int]:
    """(network without its classifier, dimension of its feature)."""
    name = settings.backbone
    for family in families():
        if family.owns(name):
            return family.make(settings)
    if is_plugin(name):
        network, feature_dim = load_plugin(name, "model.backbone")(settings)
        return network, feature_dim
    near = difflib.get_close_matches(name, [each for family in families() for each in family.names()], n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "see docs/methods.md for the names"
    raise RecipeError(f"model.backbone {name!r} is not known; {hint}")

"""Backbones by name: images to pooled features [B, feature_dim], or [E, B, feature_dim] of experts.

A name belongs to a family (`paco_ds.models.families`), or is `module:function` of code from outside the package.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from paco_ds.config.model import ModelSettings
from paco_ds.config.plugins import is_plugin, load_plugin
from paco_ds.errors import RecipeError
from paco_ds.models.adapters import add_adapters
from paco_ds.models.experts import Experts, FirstStages, whole_name
from paco_ds.models.families import USUAL_SIZES, Family, ImageSizes, Network, families

_TOO_SMALL = ("Output size is too small", "Kernel size can't be greater than actual input size")  # torch's words


class Backbone(nn.Module):
    """A network that ends in its pooled feature F(x): [B, feature_dim], or [E, B, feature_dim] of experts.

    Attributes:
        network: the network, or its `Experts`.
        arguments: with which another program builds the same network, beside the number of classes.
    """

    def __init__(
        self,
        network: nn.Module,
        feature_dim: int,
        family: Family | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.network, self.feature_dim = network, feature_dim
        self.family, self.arguments = family, dict(arguments or {})

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def blocks(self) -> list[nn.Module]:
        """The residual blocks, in order: the units of which activation checkpointing keeps the input alone."""
        kinds = tuple(kind for family in families() for kind in family.blocks)
        return [m for m in self.modules() if isinstance(m, kinds)]

    def depth_groups(self) -> dict[str, int] | None:
        """The depth of each parameter by the network's own groups, from 0 at the stem; None where it has none.

        Names are those of `named_parameters()`. Layers after the last block, as a norm, have the greatest depth.
        """
        depths = self._depths()
        return None if depths is None else {f"network.{name}": depth for name, depth in depths.items() if name}

    def head_depth(self) -> int:
        """The depth of a classifier on the feature by the same groups, where there are some. Layers that no group of
        the network names, as a norm after pooling, have it too."""
        depths = self._depths()
        assert depths is not None
        return depths[""]

    def _depths(self) -> dict[str, int] | None:
        """Depths by the network's own names, and by "" that of what none of its groups names."""
        if self.family is None or self.family.depths is None:
            return None
        names = [name.removeprefix("network.") for name, _ in self.named_parameters()]
        return self.family.depths([*names, ""], self._whole)

    def not_decayed(self) -> set[str]:
        """Names of `named_parameters()` that the network's authors train without weight decay, beside norms and
        biases: position embeddings, tokens."""
        if self.family is None or self.family.not_decayed is None:
            return set()
        theirs = self.family.not_decayed(self._whole)
        return {name for name, _ in self.named_parameters() if whole_name(name.removeprefix("network.")) in theirs}

    @property
    def _whole(self) -> nn.Module:
        """The network of the library, of experts their first stages."""
        if isinstance(self.network, Experts) and isinstance(self.network.shared, FirstStages):
            return self.network.shared.whole
        return self.network


def make_backbone(settings: ModelSettings, sizes: ImageSizes = USUAL_SIZES) -> Backbone:
    """The backbone a recipe names, randomly initialised.

    Args:
        sizes: of the views, for networks whose weights depend on the size of the images.

    Raises:
        RecipeError: an unknown name or argument, a size that the network does not take, a network without one linear
            classifier at its end, or experts of a network that has no stages to branch at.
    """
    family, network = _make_network(settings, sizes)
    if settings.experts is None:
        return Backbone(network.module, network.dim, family, network.arguments)

    def another() -> nn.Module:
        return _make_network(settings, sizes)[1].module

    for branching in families():
        experts = branching.branch and branching.branch(
            network.module, settings.experts, settings.expert_width, another
        )
        if experts is not None:
            return Backbone(experts, experts.feature_dim, family, network.arguments)
    raise RecipeError(
        f"model.experts {settings.experts}: {settings.backbone} has no stages to branch at; experts need a ResNet, "
        f"ResNeXt or cifar_resnet, or timm's ViT, Swin or ConvNeXt, or leave model.experts out"
    )


def require_enough_pixels(backbone: Backbone, name: str, sizes: ImageSizes) -> None:
    """Run a backbone on images of these sizes without content, which takes no memory.

    Args:
        name: of the backbone.

    Raises:
        RecipeError: its convolutions or its pooling leave nothing of images so small.
    """
    if backbone.family is None:  # code from outside may read its images
        return
    tensors = {n: t.to("meta") for n, t in (*backbone.named_parameters(), *backbone.named_buffers())}
    for view, size in (("query", sizes.training), ("evaluation", sizes.evaluation)):
        try:
            with torch.no_grad():
                functional_call(backbone, tensors, torch.empty(2, 3, size, size, device="meta"))
        except RuntimeError as error:
            if any(said in str(error) for said in _TOO_SMALL):  # others may be for the want of content
                raise RecipeError(
                    f"views.{view}.size {size}: model.backbone {name} makes nothing of so few pixels: raise the size "
                    f"of the views, or choose a backbone for small images, such as cifar_resnet32"
                ) from None


def _make_network(settings: ModelSettings, sizes: ImageSizes) -> tuple[Family | None, Network]:
    """With what `model.trained` adds to it."""
    family, network = _unchanged_network(settings, sizes)
    if settings.adapters is not None:
        blocks = family.transformer_blocks(network.module) if family and family.transformer_blocks else None
        add_adapters(blocks, settings.adapters, settings.backbone)
    return family, network


def _unchanged_network(settings: ModelSettings, sizes: ImageSizes) -> tuple[Family | None, Network]:
    name = settings.backbone
    for family in families():
        if family.owns(name):
            if settings.kwargs and not family.arguments:
                raise RecipeError(f"model.kwargs are arguments of timm's networks, and {name} takes none: remove them")
            return family, family.make(settings, sizes)
    if is_plugin(name):
        module, feature_dim = load_plugin(name, "model.backbone")(settings)
        return None, Network(module, feature_dim)
    near = difflib.get_close_matches(name, [each for family in families() for each in family.names()], n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "see docs/methods.md for the names"
    raise RecipeError(f"model.backbone {name!r} is not known; {hint}")

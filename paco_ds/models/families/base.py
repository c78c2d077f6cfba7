"""What a family of backbones says about itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from paco_ds.config.recipe import ModelSettings
from paco_ds.models.experts import Experts, Width


@dataclass(frozen=True)
class Family:
    """Networks that are named, built and branched in one way.

    Attributes:
        owns: whether a name of `model.backbone` belongs to the family.
        names: names to suggest for a mistyped one.
        make: settings to (network without its classifier, dimension of its pooled feature), randomly initialised;
            raises RecipeError.
        blocks: classes of its residual blocks, the units of activation checkpointing.
        branch: (network, experts, width) to a network of experts that share its first stages, or None for another
            kind of network; None where no network of the family can branch.
    """

    owns: Callable[[str], bool]
    names: Callable[[], Sequence[str]]
    make: Callable[[ModelSettings], tuple[nn.Module, int]]
    blocks: tuple[type[nn.Module], ...] = ()
    branch: Callable[[nn.Module, int, Width], Experts | None] | None = None

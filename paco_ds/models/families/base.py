"""What a family of backbones says about itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from paco_ds.config.model import ModelSettings
from paco_ds.config.views import ViewSettings
from paco_ds.models.experts import Experts, Width


class ImageSizes(NamedTuple):
    """Pixels of a side of the views of a recipe."""

    training: int
    evaluation: int

    @classmethod
    def of(cls, views: ViewSettings) -> ImageSizes:
        """Those of the query's view and of evaluations."""
        return cls(views.query.size, views.evaluation.size)


USUAL_SIZES = ImageSizes(224, 224)  # those that views have by default


@dataclass(frozen=True)
class Network:
    """A network without its classifier, randomly initialised.

    Attributes:
        module: images [B, 3, H, W] to pooled features [B, dim].
        dim: dimension of its pooled feature.
        arguments: with which another program builds the same network, beside the number of classes.
    """

    module: nn.Module
    dim: int
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """Networks that are named, built and branched in one way.

    Names of parameters and tensors are those of the network as its own library has it.

    Attributes:
        owns: whether a name of `model.backbone` belongs to the family.
        names: names to suggest for a mistyped one.
        make: settings and sizes of the views to a network; raises RecipeError.
        arguments: whether its networks take `model.kwargs`.
        blocks: classes of its residual blocks, the units of activation checkpointing.
        checkpoint: turns on the library's own activation checkpointing in all parts of a backbone that have it, and
            says whether any has; raises RecipeError. None where `blocks` are the units.
        branch: (network, experts, width, another network of the same settings) to a network of experts that share its
            first stages, or None for another kind of network; None where no network of the family can branch.
        adapt: (tensors of a file, network) to the tensors by the network's names and in its shapes, position embeddings
            resampled, as the library itself reads its authors' files; raises any error for tensors it does not know.
        depths: (names of parameters, network) to the depth of each, from 0 at the stem; None for a network that does
            not say.
        not_decayed: names of parameters that the authors of a network train without weight decay.
        transformer_blocks: the blocks of a ViT, timm's `Block`s, to which `models.adapters` adds; None of another
            network.
    """

    owns: Callable[[str], bool]
    names: Callable[[], Sequence[str]]
    make: Callable[[ModelSettings, ImageSizes], Network]
    arguments: bool = False
    blocks: tuple[type[nn.Module], ...] = ()
    checkpoint: Callable[[nn.Module], bool] | None = None
    branch: Callable[[nn.Module, int, Width, Callable[[], nn.Module]], Experts | None] | None = None
    adapt: Callable[[dict[str, Tensor], nn.Module], Mapping[str, Tensor]] | None = None
    depths: Callable[[Sequence[str], nn.Module], dict[str, int] | None] | None = None
    not_decayed: Callable[[nn.Module], set[str]] | None = None
    transformer_blocks: Callable[[nn.Module], Sequence[nn.Module] | None] | None = None

"""Losses: one method, one file, and the registry that finds the loss that a recipe names."""

from collections.abc import Callable, Mapping, Sequence

from paco_ds.config.methods import LossSettings
from paco_ds.errors import RecipeError
from paco_ds.losses.balpoe import make_balpoe
from paco_ds.losses.base import Loss, LossOutput
from paco_ds.losses.bcl import make_bcl
from paco_ds.losses.cross_entropy import (
    make_balanced_softmax,
    make_class_balanced,
    make_cross_entropy,
    make_logit_adjustment,
)
from paco_ds.losses.focal import make_focal
from paco_ds.losses.ldam import make_ldam
from paco_ds.losses.multitask import make_multi_task
from paco_ds.losses.paco import ParametricContrastiveLoss, class_prior, make_paco
from paco_ds.losses.proco import make_proco
from paco_ds.losses.ride import make_ride
from paco_ds.losses.routing import make_routing
from paco_ds.losses.supcon import make_supcon

__all__ = ["METHODS", "Loss", "LossOutput", "ParametricContrastiveLoss", "class_prior", "make_loss"]

METHODS: Mapping[str, Callable[[LossSettings, Sequence[int], Sequence[str] | None], Loss]] = {
    "paco": make_paco,
    "cross_entropy": make_cross_entropy,
    "balanced_softmax": make_balanced_softmax,
    "logit_adjustment": make_logit_adjustment,
    "class_balanced": make_class_balanced,
    "focal": make_focal,
    "ldam": make_ldam,
    "supcon": lambda settings, class_counts, class_names: make_supcon(settings),
    "multi_task": make_multi_task,
    "ride": make_ride,
    "routing": make_routing,
    "balpoe": make_balpoe,
    "bcl": make_bcl,
    "proco": make_proco,
}
"""What `loss.method` can be."""


def make_loss(
    settings: LossSettings, class_counts: Sequence[int] | None, class_names: Sequence[str] | None = None
) -> Loss:
    """The loss of a recipe, for a training split with these class counts.

    Raises:
        DataError: the method needs class counts and a class has no training images.
        RecipeError: there are no class counts at all.
    """
    if class_counts is None or len(class_counts) == 0:
        raise RecipeError(
            f"loss.method {settings.method} needs the training images of every class: give it a data set with a "
            f"manifest (tools/build_shards.py build writes one)"
        )
    return METHODS[settings.method](settings, class_counts, class_names)

"""Losses: one method, one file. `make_loss` builds the loss of a recipe's method."""

from collections.abc import Sequence
from importlib import import_module

from paco_ds.config.loss import LossSettings
from paco_ds.errors import RecipeError
from paco_ds.losses.base import Anchors, Loss, LossOutput
from paco_ds.losses.paco import ParametricContrastiveLoss, class_prior

__all__ = ["Anchors", "Loss", "LossOutput", "ParametricContrastiveLoss", "class_prior", "make_loss"]


def make_loss(
    settings: LossSettings, class_counts: Sequence[int] | None, class_names: Sequence[str] | None = None
) -> Loss:
    """The loss of a recipe, for a training split with these class counts.

    Raises:
        DataError: the method needs class counts and a class has no training images.
        RecipeError: there are no class counts at all.
    """
    method = settings.active
    if class_counts is None or len(class_counts) == 0:
        raise RecipeError(
            f"loss.method {settings.method} needs the training images of every class: give it a data set with a "
            f"manifest (paco-build-shards build writes one)"
        )
    make = type(method).loss  # of the class: a function is not bound to the settings
    if isinstance(make, str):
        module, _, function = make.partition(":")
        make = getattr(import_module(module), function)
    loss: Loss = make(method, settings, class_counts, class_names)
    return loss

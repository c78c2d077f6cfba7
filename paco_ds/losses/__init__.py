"""Losses: the general form of the parametric contrastive loss, and the loss that a recipe names."""

from collections.abc import Sequence

from paco_ds.losses.paco import ParametricContrastiveLoss, class_prior
from paco_ds.recipe import LossSettings


def make_loss(
    settings: LossSettings, class_counts: Sequence[int], class_names: Sequence[str] | None = None
) -> ParametricContrastiveLoss:
    """The loss of a recipe, for a training split with these class counts.

    Raises:
        DataError: the method needs a class prior and a class has no training images.
    """
    return ParametricContrastiveLoss(
        alpha=settings.alpha,
        beta=settings.beta,
        gamma=settings.gamma,
        temperature=settings.temperature,
        supt=settings.supt,
        smoothing=settings.smoothing,
        normalization=settings.normalization,
        log_prior_C=class_prior(class_counts, class_names) if settings.uses_class_prior else None,
        contrast=settings.contrast,
    )

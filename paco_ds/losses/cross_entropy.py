"""Owns the losses that are a softmax over the centers and differ by what is added to the logits or by weights.

With z the center logits, q(y) the share of class y in the training images, r_y weights of mean 1::

    cross-entropy                          L = - log softmax(z)_y
    Balanced Softmax (Ren et al. 2020)     L = - log softmax(z + log q)_y
    logit adjustment (Menon et al. 2021)   L = - log softmax(z + tau log q)_y        Eq. (10)
    class-balanced (Cui et al. 2019)       L = - r_y log softmax(z)_y                r_y ~ (1 - b) / (1 - b^n_y)

All are means over the images, and settings of :class:`paco_ds.losses.paco.ParametricContrastiveLoss` without contrast.
Predictions use plain logits.
"""

from collections.abc import Sequence

from paco_ds.config.methods import LossSettings
from paco_ds.losses.base import counts_of_classes, effective_number_weights
from paco_ds.losses.paco import ParametricContrastiveLoss, class_prior, general_form

Names = Sequence[str] | None


def make_cross_entropy(
    settings: LossSettings, class_counts: Sequence[int], class_names: Names
) -> ParametricContrastiveLoss:
    """Class counts play no part."""
    return general_form(settings, contrast=False)


def make_balanced_softmax(
    settings: LossSettings, class_counts: Sequence[int], class_names: Names
) -> ParametricContrastiveLoss:
    """Raises DataError for a class without training images, as the next two."""
    return general_form(settings, contrast=False, log_prior_C=class_prior(class_counts, class_names))


def make_logit_adjustment(
    settings: LossSettings, class_counts: Sequence[int], class_names: Names
) -> ParametricContrastiveLoss:
    """tau 1 is Balanced Softmax."""
    prior_C = settings.logit_adjustment.tau * class_prior(class_counts, class_names)
    return general_form(settings, contrast=False, log_prior_C=prior_C)


def make_class_balanced(
    settings: LossSettings, class_counts: Sequence[int], class_names: Names
) -> ParametricContrastiveLoss:
    """The softmax form, weights scaled to a mean of 1 over classes as in its code."""
    counts_C = counts_of_classes(
        class_counts, class_names, "loss.method class_balanced", "set loss.method to cross_entropy"
    )
    weight_C = effective_number_weights(counts_C, settings.class_balanced.beta)
    return general_form(settings, contrast=False, class_weight_C=weight_C)

"""The losses that are one softmax over the centers; they differ in what is added to the logits, and in weights.

With z the center logits, q(y) the share of class y in the training images, r_y weights of mean 1::

    cross-entropy                          L = - log softmax(z)_y
    Balanced Softmax (Ren et al. 2020)     L = - log softmax(z + log q)_y
    logit adjustment (Menon et al. 2021)   L = - log softmax(z + tau log q)_y        Eq. (10)
    class-balanced (Cui et al. 2019)       L = - r_y log softmax(z)_y                r_y ~ (1 - b) / (1 - b^n_y)

All are means over the images, and settings of :class:`paco_ds.losses.paco.ParametricContrastiveLoss` without contrast.
Predictions use plain logits.
"""

from collections.abc import Sequence

from paco_ds.config.loss import LossSettings
from paco_ds.config.methods.base import Method
from paco_ds.config.methods.cross_entropy import ClassBalancedSettings, LogitAdjustmentSettings
from paco_ds.losses.base import counts_of_classes, effective_number_weights
from paco_ds.losses.paco import ParametricContrastiveLoss, class_prior, general_form

Names = Sequence[str] | None


def make_cross_entropy(
    settings: Method, shared: LossSettings, class_counts: Sequence[int], class_names: Names
) -> ParametricContrastiveLoss:
    """Cross-entropy; class counts are ignored."""
    return general_form(shared, contrast=False)


def make_balanced_softmax(
    settings: Method, shared: LossSettings, class_counts: Sequence[int], class_names: Names
) -> ParametricContrastiveLoss:
    """Balanced Softmax; raises DataError for a class without training images, like the next two."""
    return general_form(shared, contrast=False, log_prior_C=class_prior(class_counts, class_names))


def make_logit_adjustment(
    settings: LogitAdjustmentSettings, shared: LossSettings, class_counts: Sequence[int], class_names: Names
) -> ParametricContrastiveLoss:
    """Logit adjustment; tau 1 is Balanced Softmax."""
    prior_C = settings.tau * class_prior(class_counts, class_names)
    return general_form(shared, contrast=False, log_prior_C=prior_C)


def make_class_balanced(
    settings: ClassBalancedSettings, shared: LossSettings, class_counts: Sequence[int], class_names: Names
) -> ParametricContrastiveLoss:
    """The softmax form, weights scaled to a mean of 1 over classes as in its code."""
    counts_C = counts_of_classes(
        class_counts, class_names, "loss.method class_balanced", "set loss.method to cross_entropy"
    )
    weight_C = effective_number_weights(counts_C, settings.beta)
    return general_form(shared, contrast=False, class_weight_C=weight_C)

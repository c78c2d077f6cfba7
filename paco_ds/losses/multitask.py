"""The multi-task baselines: cross-entropy or Balanced Softmax plus a weighted SupCon term (Tables 13, 14)::

    L_i = softmax_i - weight r_y / |P(i)| sum_P(i) log(exp(s_j + b_j) / sum_A(i) exp(s_k + b_k))

r_y = C e_y / sum_c e_c with e_c = (1 - beta) / (1 - beta^n_c) (Cui et al. 2019) where the contrast is re-weighted, 1
elsewhere; b_j = log q(y_j) where it is balanced ("CE + Balanced Softmax"; our reading), and 0 elsewhere.

Unlike in PaCo, each term has its own denominator. Shapes: B anchors, C classes, D dimension.
"""

from collections.abc import Sequence

from paco_ds.config.loss import LossSettings
from paco_ds.config.methods.multi_task import MultiTaskSettings
from paco_ds.losses.base import Anchors, Loss, LossOutput, counts_of_classes, effective_number_weights
from paco_ds.losses.paco import ParametricContrastiveLoss, class_prior, general_form
from paco_ds.losses.supcon import contrast_alone


class MultiTaskLoss(Loss):
    """L = softmax + weight x contrast, two settings of :class:`ParametricContrastiveLoss`.

    Args:
        softmax: the term over the centers, `contrast=False`.
        contrast: the term over A(i), `centers=False`; re-weighted SupCon has `class_weight_C`.
        weight: of the contrast term, above 0.

    Raises:
        ValueError: a term of the wrong kind, or a weight that is not positive.

    Example:
        >>> softmax = ParametricContrastiveLoss(contrast=False, alpha=0, temperature=1, log_prior_C=class_prior(counts))
        >>> supcon = ParametricContrastiveLoss(centers=False, beta=0, alpha=1, temperature=0.2)
        >>> loss = MultiTaskLoss(softmax, supcon, weight=0.5)
    """

    part_names = ("softmax", "contrast")

    def __init__(
        self, softmax: ParametricContrastiveLoss, contrast: ParametricContrastiveLoss, weight: float = 1.0
    ) -> None:
        super().__init__()
        if softmax.contrast or contrast.centers or not weight > 0:
            raise ValueError(
                "the multi-task loss is a term with contrast=False plus a positive weight times one with "
                f"centers=False, got contrast={softmax.contrast}, centers={contrast.centers} and {weight=}"
            )
        self.softmax, self.contrast, self.weight = softmax, contrast, weight

    def forward(self, anchors: Anchors) -> LossOutput:
        """As :meth:`ParametricContrastiveLoss.forward`; p_c is of the softmax term, p+ of the contrast term."""
        centers: LossOutput = self.softmax(anchors)
        pairs: LossOutput = self.contrast(anchors)
        return LossOutput(
            centers.loss + self.weight * pairs.loss,
            centers.center_probability_B,
            centers.center_optimum_B,
            pairs.positive_probability_B,
            pairs.positive_optimum_B,
            {"softmax": centers.loss.detach(), "contrast": pairs.loss.detach()},
        )


def make_multi_task(
    settings: MultiTaskSettings, shared: LossSettings, class_counts: Sequence[int], class_names: Sequence[str] | None
) -> MultiTaskLoss:
    """The rows of Tables 13 and 14 that are sums: the softmax term is cross-entropy or Balanced Softmax, the contrast
    SupCon, re-weighted by effective numbers (each anchor by r_y) or with log q(y_j) added to the contrast logits.
    """
    prior_C = None
    if "balanced_softmax" in (settings.softmax, settings.contrast):
        prior_C = class_prior(class_counts, class_names)
    softmax = general_form(
        shared, contrast=False, log_prior_C=prior_C if settings.softmax == "balanced_softmax" else None
    )
    if settings.contrast == "reweighted":
        counts_C = counts_of_classes(
            class_counts, class_names, "Re-weighting", "set loss.multi_task.contrast to supcon"
        )
        weight_C = effective_number_weights(counts_C, settings.beta)
        return MultiTaskLoss(softmax, contrast_alone(shared, class_weight_C=weight_C), settings.weight)
    bias_C = prior_C if settings.contrast == "balanced_softmax" else None
    return MultiTaskLoss(softmax, contrast_alone(shared, contrast_bias_C=bias_C), settings.weight)

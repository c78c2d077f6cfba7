"""The focal loss (Lin et al. 2017) in its softmax form.

With p = softmax(z)_y, the probability of the own class, and r_y weights of effective numbers (1 without them)::

    L = - r_y (1 - p)^gamma log p                                   mean over the images; Eq. (5)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from paco_ds.config.loss import LossSettings
from paco_ds.config.methods.focal import FocalSettings
from paco_ds.losses.base import (
    Anchors,
    Loss,
    LossOutput,
    counts_of_classes,
    effective_number_weights,
    gather_label,
    logits_by_expert,
)


class FocalLoss(Loss):
    """Cross-entropy that counts less where the model is already right.

    Args:
        gamma: at least 0, which is cross-entropy; 2 as published.
        classes: C.
        class_weight_C: r_y, or None.

    Raises:
        ValueError: gamma below 0, or weights that are not one finite number for each class.
    """

    class_weight_C: Tensor | None

    def __init__(self, gamma: float, classes: int, class_weight_C: Tensor | None = None) -> None:
        super().__init__()
        if not gamma >= 0:
            raise ValueError(f"the focal loss needs gamma of at least 0, got {gamma}")
        if class_weight_C is not None and not (class_weight_C.shape == (classes,) and class_weight_C.isfinite().all()):
            raise ValueError(f"class weights are one finite number for each of {classes} classes")
        self.gamma, self.classes = gamma, classes
        self.register_buffer("class_weight_C", class_weight_C, persistent=False)

    def forward(self, anchors: Anchors) -> LossOutput:
        """Loss of center logits [B, C] or [E, B, C], of experts the mean."""
        labels_B = anchors.labels_B
        with torch.autocast(labels_B.device.type, enabled=False):
            log_p_EB = gather_label(logits_by_expert(anchors.logits, labels_B, self.classes).log_softmax(2), labels_B)
            # 1 - p from its logarithm, exact for p near 1. At p = 1 its power has no derivative for gamma below 1,
            # so it is kept off 0 by a number too small to be seen elsewhere.
            rest_EB = (-torch.expm1(log_p_EB)).clamp_min(torch.finfo(log_p_EB.dtype).tiny)
            loss_EB = -(rest_EB**self.gamma) * log_p_EB
            if self.class_weight_C is not None:
                loss_EB = loss_EB * self.class_weight_C[labels_B]
            probability_B = log_p_EB.detach().exp().mean(0)
            return LossOutput(loss_EB.mean(), probability_B, torch.ones_like(probability_B))


def make_focal(
    settings: FocalSettings, shared: LossSettings, class_counts: Sequence[int], class_names: Sequence[str] | None
) -> FocalLoss:
    """Focal loss; with `class_balanced` every class needs a training image."""
    weight_C = None
    if settings.class_balanced:
        counts_C = counts_of_classes(class_counts, class_names, "Re-weighting", "set loss.focal.class_balanced=false")
        weight_C = effective_number_weights(counts_C, settings.beta)
    return FocalLoss(settings.gamma, len(class_counts), weight_C)

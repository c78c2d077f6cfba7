"""Owns the multi-task baselines: cross-entropy or Balanced Softmax plus a weighted SupCon term (Tables 12, 13).

Unlike in PaCo, each term has its own denominator. Shapes: B anchors, C classes, D dimension.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from paco_ds.key_queue import QueueSnapshot
from paco_ds.losses.paco import LossOutput, ParametricContrastiveLoss


class MultiTaskLoss(nn.Module):
    """softmax + weight x contrast, two settings of :class:`ParametricContrastiveLoss`.

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

    def forward(
        self,
        labels_B: Tensor,
        center_logits_BC: Tensor,
        query_BD: Tensor,
        key_BD: Tensor | None = None,
        queue: QueueSnapshot | None = None,
    ) -> LossOutput:
        """As :meth:`ParametricContrastiveLoss.forward`; p_c is of the softmax term and p+ of the contrast term."""
        centers: LossOutput = self.softmax(labels_B, center_logits_BC)
        pairs: LossOutput = self.contrast(labels_B, None, query_BD, key_BD, queue)
        return LossOutput(
            centers.loss + self.weight * pairs.loss,
            centers.center_probability_B,
            centers.center_optimum_B,
            pairs.positive_probability_B,
            pairs.positive_optimum_B,
        )


def effective_number_weights(class_counts: Tensor | Sequence[int], beta: float = 0.999) -> Tensor:
    """Return r_c = C e_c / sum e with e_c = (1 - beta) / (1 - beta^n_c) [C], float32, of mean 1 (Cui et al. 2019).

    The published multi-task code means these weights, but a slip of shapes makes all of them 1.

    Args:
        class_counts: n_c >= 1, training images of each class.
        beta: in [0, 1): 0 gives equal weights, towards 1 they become proportional to 1 / n_c.

    Raises:
        ValueError: a class without images, or beta out of range.
    """
    counts_C = torch.as_tensor(class_counts, dtype=torch.float64)
    if not (0 <= beta < 1 and counts_C.numel() and counts_C.min() >= 1):
        raise ValueError(f"effective numbers need an image of each class at least and beta in [0, 1), got {beta=}")
    weight_C = (1 - beta) / (1 - beta**counts_C)
    return (len(counts_C) * weight_C / weight_C.sum()).float()

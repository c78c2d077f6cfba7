"""Balanced contrastive learning, BCL (Zhu et al. 2022): class averaging and class complement.

A(i) is the other queries, the keys, the queue and a prototype of every class (class complement), B_c those of A(i)
with class c, never empty. With s_j = q_i.k_j / temperature::

    L_i = - 1 / |B_y| sum_{p in B_y} log( exp(s_p) / sum_c 1 / |B_c| sum_{k in B_c} exp(s_k) )
    L   = softmax_weight (logit-adjusted cross-entropy) + contrast_weight mean_i L_i

A prototype is a class's center through a projection of its own. The paper draws three views: one for the centers, two
for the contrast, through one encoder and without a queue. Here the two views stand for the contrast's: with
`key_encoder: none` and `queue.length: 0` both are anchors, as in the paper, and both go to the centers too; with a key
encoder and a queue their keys are further members of A(i).

Shapes: E experts, B anchors, O members of A(i), C classes, D dimension.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from paco_ds.config.loss import LossSettings
from paco_ds.config.methods.bcl import BclSettings
from paco_ds.losses.base import Anchors, Loss, LossOutput, rows_by_expert
from paco_ds.losses.paco import ParametricContrastiveLoss, class_prior, general_form


class BalancedContrastiveLoss(Loss):
    """Two terms, each with its own denominator.

    Args:
        softmax: the term over the centers, `contrast=False`.
        classes: C.
        temperature: of the contrast.
        softmax_weight, contrast_weight: 1 and .35 as published for ImageNet-LT.

    Raises:
        ValueError: a softmax term with contrast, or a temperature or weight that is not positive.
    """

    part_names = ("softmax", "contrast")

    def __init__(
        self,
        softmax: ParametricContrastiveLoss,
        classes: int,
        temperature: float,
        softmax_weight: float = 1.0,
        contrast_weight: float = 0.35,
    ) -> None:
        super().__init__()
        if softmax.contrast or not min(temperature, softmax_weight, contrast_weight) > 0:
            raise ValueError(
                "BCL is a softmax term with contrast=False plus a contrast, and needs positive temperature and "
                f"weights: {softmax.contrast=}, {temperature=}, {softmax_weight=}, {contrast_weight=}"
            )
        self.softmax, self.classes, self.temperature = softmax, classes, temperature
        self.softmax_weight, self.contrast_weight = softmax_weight, contrast_weight

    def forward(self, anchors: Anchors) -> LossOutput:
        """Loss of logits, queries and prototypes, with keys and queue if there are any; of experts the mean.

        Raises:
            ValueError: an input missing or of the wrong shape.
        """
        centers: LossOutput = self.softmax(anchors)
        with torch.autocast(anchors.labels_B.device.type, enabled=False):
            contrast = self._contrast(anchors)
        loss = self.softmax_weight * centers.loss + self.contrast_weight * contrast
        parts = {"softmax": centers.loss.detach(), "contrast": contrast.detach()}
        return LossOutput(loss, centers.center_probability_B, centers.center_optimum_B, parts=parts)

    def _contrast(self, anchors: Anchors) -> Tensor:
        if anchors.queries is None or anchors.prototypes is None:
            raise ValueError("BCL needs queries and prototypes")
        labels_B, queue = anchors.labels_B, anchors.queue
        size = len(labels_B)
        rows = [rows_by_expert("queries", anchors.queries, size)]
        labels = [labels_B]
        if anchors.keys is not None:
            rows.append(rows_by_expert("keys", anchors.keys, size))
            labels.append(labels_B)
        if queue is not None and len(queue):
            queue.check_current()
            rows.append(queue.keys_ND if queue.keys_ND.ndim == 3 else queue.keys_ND[None])
            labels.append(queue.labels_N)
        rows.append(rows_by_expert("prototypes", anchors.prototypes, self.classes))
        labels.append(torch.arange(self.classes, device=labels_B.device))
        shapes = [tuple(r.shape) for r in rows]
        if len({(shape[0], shape[2]) for shape in shapes}) > 1:
            raise ValueError(f"queries, keys, queue and prototypes need the same experts and dimension, got {shapes}")

        dtype = torch.float64 if rows[0].dtype == torch.float64 else torch.float32
        query_EBD, rows_EOD = rows[0].to(dtype), torch.cat([r.to(dtype) for r in rows], 1)
        labels_O = torch.cat(labels)
        score_EBO = query_EBD @ rows_EOD.mT / self.temperature
        itself_BO = torch.zeros(size, len(labels_O), dtype=torch.bool, device=labels_B.device)
        itself_BO.fill_diagonal_(True)
        same_BO = (labels_B[:, None] == labels_O) & ~itself_BO
        count_C = torch.zeros(self.classes, dtype=dtype, device=labels_B.device)
        count_C.scatter_add_(0, labels_O, torch.ones_like(labels_O, dtype=dtype))
        # the anchor itself is counted with its class, but is no member of its own A(i)
        log_count_BO = (count_C[labels_O] - same_BO.to(dtype)).log()
        averaged_EBO = (score_EBO - log_count_BO).masked_fill(itself_BO, -math.inf)
        positives_B = count_C[labels_B] - 1
        pull_EB = (score_EBO * same_BO).sum(2) / positives_B
        return (averaged_EBO.logsumexp(2) - pull_EB).mean()


def make_bcl(
    settings: BclSettings, shared: LossSettings, class_counts: Sequence[int], class_names: Sequence[str] | None
) -> BalancedContrastiveLoss:
    """BCL at the recipe's temperature with the weights of its settings."""
    softmax = general_form(shared, contrast=False, log_prior_C=class_prior(class_counts, class_names))
    return BalancedContrastiveLoss(
        softmax, len(class_counts), shared.temperature, settings.softmax_weight, settings.contrast_weight
    )

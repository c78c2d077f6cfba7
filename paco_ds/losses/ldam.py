"""LDAM and its deferred re-weighting, LDAM-DRW (Cao et al. 2019).

With cosine logits z = s cos(feature, center), n_y training images of class y and weights r_y of effective numbers::

    margin_y = max_margin n_y^(-1/4) / max_c n_c^(-1/4)
    l = - log(exp(z_y - s margin_y) / (exp(z_y - s margin_y) + sum_{c != y} exp(z_c)))
    L = sum_i r_y l_i / sum_i r_y                    (their Algorithm 1)

r_y is 1 until `drw_epoch` epochs are done. The weighted mean is over the images of a micro-batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from paco_ds.config.loss import LossSettings
from paco_ds.config.methods.ldam import LdamSettings
from paco_ds.losses.base import (
    Anchors,
    Loss,
    LossOutput,
    counts_of_classes,
    effective_number_weights,
    gather_label,
    logits_by_expert,
)


class LdamLoss(Loss):
    """Label-distribution-aware margins: rare classes are kept further from the boundary.

    Args:
        class_counts: n_y >= 1.
        max_margin: that of the rarest class, .5 as published.
        scale: s of the cosine centers, 30 as published.
        drw_epoch: epochs after which weights apply; None never.
        beta: of the effective numbers, .9999 as published.

    Raises:
        ValueError: a class without images, max_margin below 0, a scale that is not positive, beta out of [0, 1).
    """

    shift_C: Tensor
    class_weight_C: Tensor

    def __init__(
        self,
        class_counts: Tensor | Sequence[int],
        max_margin: float = 0.5,
        scale: float = 30.0,
        drw_epoch: int | None = None,
        beta: float = 0.9999,
    ) -> None:
        super().__init__()
        self.register_buffer("shift_C", scale * margins(class_counts, max_margin), persistent=False)
        self.register_buffer("class_weight_C", effective_number_weights(class_counts, beta), persistent=False)
        if not scale > 0:
            raise ValueError(f"LDAM needs a positive scale of the cosine centers, got {scale}")
        self.drw_epoch, self.changes_with_epoch = drw_epoch, drw_epoch is not None
        self.reweighted = False

    def begin_epoch(self, epoch: int) -> None:
        """Weights apply from epoch `drw_epoch` on, counted from 0."""
        self.reweighted = self.drw_epoch is not None and epoch >= self.drw_epoch

    def forward(self, anchors: Anchors) -> LossOutput:
        """Loss of cosine logits [B, C] or [E, B, C], of experts the mean."""
        labels_B = anchors.labels_B
        with torch.autocast(labels_B.device.type, enabled=False):
            logits_EBC = logits_by_expert(anchors.logits, labels_B, len(self.shift_C))
            log_p_EB = gather_label(with_margins(logits_EBC, labels_B, self.shift_C).log_softmax(2), labels_B)
            loss = weighted_mean(-log_p_EB, self.class_weight_C[labels_B] if self.reweighted else None).mean()
            probability_B = log_p_EB.detach().exp().mean(0)
            return LossOutput(loss, probability_B, torch.ones_like(probability_B))


def margins(class_counts: Tensor | Sequence[int], max_margin: float) -> Tensor:
    """n^(-1/4), scaled so that the largest is `max_margin`; [C] float32.

    Raises:
        ValueError: a class without images, or a margin below 0.
    """
    counts_C = torch.as_tensor(class_counts, dtype=torch.float64)
    if not (counts_C.numel() and counts_C.min() >= 1 and max_margin >= 0):
        raise ValueError(f"margins need an image of each class and max_margin of at least 0, got {max_margin=}")
    return (max_margin * (counts_C / counts_C.min()) ** -0.25).float()


def with_margins(logits_EBC: Tensor, labels_B: Tensor, shift_C: Tensor) -> Tensor:
    """The logits, that of the own class less its shift."""
    index_EB1 = labels_B[:, None].expand(*logits_EBC.shape[:2], 1)
    shift_EB1 = shift_C.to(logits_EBC.dtype)[labels_B][:, None].expand_as(index_EB1)
    return logits_EBC.scatter_add(2, index_EB1, -shift_EB1)


def weighted_mean(loss_EB: Tensor, weight_B: Tensor | None) -> Tensor:
    """Of each expert, [E]."""
    if weight_B is None:
        return loss_EB.mean(1)
    return (loss_EB * weight_B).sum(1) / weight_B.sum()


def make_ldam(
    settings: LdamSettings, shared: LossSettings, class_counts: Sequence[int], class_names: Sequence[str] | None
) -> LdamLoss:
    """LDAM; with `drw_epoch` LDAM-DRW."""
    counts_C = counts_of_classes(class_counts, class_names, "loss.method ldam", "set loss.method to cross_entropy")
    return LdamLoss(counts_C, settings.max_margin, settings.scale, settings.drw_epoch, settings.beta)

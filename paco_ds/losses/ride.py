"""The loss of RIDE, stage one (Wang et al. 2021): accurate experts that differ from each other.

With z_e the logits of expert e, z the mean of all, T_c temperatures of the classes and T their mean::

    L = sum_e [ l(z_e) - diversity T^2 mean_i KL( softmax(z / T_c) || softmax(z_e / T_c) ) ]
    T_c = temperature w_c / max w,    w_c = reweight_factor C q_c + 1 - reweight_factor

where l is LDAM's loss or cross-entropy, and no gradient flows through the mean of the experts. Up to `reweight_epoch`
T_c is `temperature` of every class; from then on LDAM is re-weighted by effective numbers too, as published. The
published code has the mean of experts in place of the other experts in pairs, as here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from paco_ds.config.loss import LossSettings
from paco_ds.config.methods.ride import RideSettings
from paco_ds.losses.base import (
    Anchors,
    Loss,
    LossOutput,
    counts_of_classes,
    effective_number_weights,
    gather_label,
    logits_by_expert,
)
from paco_ds.losses.ldam import margins, weighted_mean, with_margins


class RideLoss(Loss):
    """The sum over experts of their own losses, less what they differ from their mean.

    Args:
        class_counts: n_c >= 1.
        settings: of the recipe; see there.

    Raises:
        ValueError: a class without images.
    """

    part_names = ("base", "diversity")
    shift_C: Tensor
    class_weight_C: Tensor
    temperature_C: Tensor

    def __init__(self, class_counts: Tensor | Sequence[int], settings: RideSettings) -> None:
        super().__init__()
        self.settings = settings
        counts_C = torch.as_tensor(class_counts, dtype=torch.float64)
        margin_C = margins(counts_C, settings.max_margin if settings.base == "ldam" else 0.0)
        factor = settings.reweight_factor
        share_C = factor * len(counts_C) * counts_C / counts_C.sum() + 1 - factor
        if share_C.min() <= 0:
            raise ValueError(f"reweight_factor {factor} leaves a class no temperature; lower it")
        by_class = {
            "shift_C": settings.scale * margin_C,
            "class_weight_C": effective_number_weights(counts_C, settings.beta),
            "temperature_C": (settings.temperature * share_C / share_C.max()).float(),
        }
        for name, values_C in by_class.items():
            self.register_buffer(name, values_C, persistent=False)
        self.changes_with_epoch = settings.reweight_epoch is not None
        self.reweighted = False

    def begin_epoch(self, epoch: int) -> None:
        """Weights and class-wise temperatures apply from epoch `reweight_epoch` on, counted from 0."""
        first = self.settings.reweight_epoch
        self.reweighted = first is not None and epoch >= first

    def forward(self, anchors: Anchors) -> LossOutput:
        """Loss of the experts' logits [E, B, C].

        Raises:
            ValueError: logits of no experts.
        """
        labels_B, logits = anchors.labels_B, anchors.logits
        if logits is not None and logits.ndim != 3:
            raise ValueError(f"RIDE needs logits of experts [E, B, C], got {tuple(logits.shape)}")
        with torch.autocast(labels_B.device.type, enabled=False):
            logits_EBC = logits_by_expert(logits, labels_B, len(self.shift_C))
            log_p_EB = gather_label(with_margins(logits_EBC, labels_B, self.shift_C).log_softmax(2), labels_B)
            reweighted = self.reweighted and self.settings.base == "ldam"
            base = weighted_mean(-log_p_EB, self.class_weight_C[labels_B] if reweighted else None).sum()
            diversity = self._diversity(logits_EBC)
            loss = base - self.settings.diversity * diversity
            return LossOutput(loss, parts={"base": base.detach(), "diversity": diversity.detach()})

    def _diversity(self, logits_EBC: Tensor) -> Tensor:
        """T^2 x the sum over experts of the mean divergence from their mean."""
        flat_C = torch.full_like(self.temperature_C, self.settings.temperature)
        temperature_C = (self.temperature_C if self.reweighted else flat_C).to(logits_EBC.dtype)
        log_p_EBC = (logits_EBC / temperature_C).log_softmax(2)
        mean_log_p_BC = (logits_EBC.detach().mean(0) / temperature_C).log_softmax(1)
        divergence_EB = (mean_log_p_BC.exp() * (mean_log_p_BC - log_p_EBC)).sum(2)
        return temperature_C.mean() ** 2 * divergence_EB.mean(1).sum()


def make_ride(
    settings: RideSettings, shared: LossSettings, class_counts: Sequence[int], class_names: Sequence[str] | None
) -> RideLoss:
    """RIDE; every class needs a training image."""
    counts_C = counts_of_classes(class_counts, class_names, "loss.method ride", "set loss.method to cross_entropy")
    return RideLoss(counts_C, settings)

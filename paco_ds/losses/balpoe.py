"""The loss of BalPoE (Aimar et al. 2023): every expert is trained for a test distribution of its own.

With z_e the logits of expert e, lambda_e its bias and q the class prior::

    L = mean_e - log softmax(z_e + (1 - lambda_e) log q)_y

Lambdas 1, 0, -1 as published: experts for the training distribution, for a uniform one and for the inverse one; their
mean is 0, so that the mean of the experts' logits suits a uniform distribution. It wants calibrated experts, which
the paper gets from mixup: `step.mixup`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from paco_ds.config.loss import LossSettings
from paco_ds.config.methods.balpoe import BalPoESettings
from paco_ds.losses.base import Anchors, Loss, LossOutput, biased_log_softmax, gather_label
from paco_ds.losses.paco import class_prior


class BalPoELoss(Loss):
    """The mean of the experts' logit-adjusted losses.

    Args:
        log_prior_C: log q.
        lambdas: of each expert.

    Raises:
        ValueError: no lambda.
    """

    bias_EC: Tensor

    def __init__(self, log_prior_C: Tensor, lambdas: Sequence[float]) -> None:
        super().__init__()
        if not lambdas:
            raise ValueError("BalPoE needs a lambda for each expert")
        tau_E = 1 - torch.tensor(lambdas, dtype=torch.float32)
        self.register_buffer("bias_EC", tau_E[:, None] * log_prior_C, persistent=False)
        self.part_names = tuple(f"expert_{e}" for e in range(1, len(lambdas) + 1))

    def forward(self, anchors: Anchors) -> LossOutput:
        """Loss of the experts' logits [E, B, C].

        Raises:
            ValueError: another number of experts than lambdas.
        """
        labels_B = anchors.labels_B
        with torch.autocast(labels_B.device.type, enabled=False):
            log_p_EB = gather_label(biased_log_softmax(anchors.logits, labels_B, self.bias_EC), labels_B)
            loss_E = -log_p_EB.mean(1)
            probability_B = log_p_EB.detach().exp().mean(0)
            parts = dict(zip(self.part_names, loss_E.detach().unbind(), strict=True))
            return LossOutput(loss_E.mean(), probability_B, torch.ones_like(probability_B), parts=parts)


def make_balpoe(
    settings: BalPoESettings, shared: LossSettings, class_counts: Sequence[int], class_names: Sequence[str] | None
) -> BalPoELoss:
    """BalPoE with the lambdas of its settings."""
    return BalPoELoss(class_prior(class_counts, class_names), settings.lambdas)

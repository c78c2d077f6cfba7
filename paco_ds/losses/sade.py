"""The training loss of SADE (Zhang et al. 2022): three experts, each for a distribution of its own.

With z_e the logits of expert e, q the class prior and q' the prior in reverse, the rarest class having the share of the
most frequent one and so on::

    L = - log softmax(z_1)_y - log softmax(z_2 + log q)_y - log softmax(z_3 + log q - tau log q')_y

each the mean over images. Their weights are learned on the test images, without labels: `evaluation.aggregation`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from paco_ds.config.loss import LossSettings
from paco_ds.config.methods.sade import SadeSettings
from paco_ds.losses.base import Anchors, Loss, LossOutput, biased_log_softmax, gather_label
from paco_ds.losses.paco import class_prior


class SadeLoss(Loss):
    """The sum of the losses of a forward, a uniform and a backward expert.

    Args:
        log_prior_C: log q.
        tau: strength of the reverse prior.
    """

    part_names = ("forward", "uniform", "backward")
    bias_EC: Tensor

    def __init__(self, log_prior_C: Tensor, tau: float) -> None:
        super().__init__()
        backward_C = log_prior_C - tau * reversed_prior(log_prior_C)
        bias_EC = torch.stack([torch.zeros_like(log_prior_C), log_prior_C, backward_C])
        self.register_buffer("bias_EC", bias_EC, persistent=False)

    def forward(self, anchors: Anchors) -> LossOutput:
        """Loss of the experts' logits [3, B, C].

        Raises:
            ValueError: another number of experts.
        """
        labels_B = anchors.labels_B
        with torch.autocast(labels_B.device.type, enabled=False):
            log_p_EB = gather_label(biased_log_softmax(anchors.logits, labels_B, self.bias_EC), labels_B)
            loss_E = -log_p_EB.mean(1)
            return LossOutput(loss_E.sum(), parts=dict(zip(self.part_names, loss_E.detach().unbind(), strict=True)))


def reversed_prior(prior_C: Tensor) -> Tensor:
    """The values in reverse: the class of rank r gets that of rank C - 1 - r. Of equal values the class of lower index
    has the lower rank (the published sort leaves that open)."""
    values_C, order_C = prior_C.sort(stable=True)
    return torch.empty_like(values_C).index_copy_(0, order_C, values_C.flip(0))


def make_sade(
    settings: SadeSettings, shared: LossSettings, class_counts: Sequence[int], class_names: Sequence[str] | None
) -> SadeLoss:
    """SADE with the tau of its settings."""
    return SadeLoss(class_prior(class_counts, class_names), settings.tau)

"""The loss of MDCS (Zhao et al. 2023): diverse experts, each taught by itself on an easier view.

With z_e the logits of expert e, tau_e its strength, q the class prior, v and w the weak and the strong view of an
image, p_e = softmax(z_e + tau_e log q), and R_e the images whose weak view expert e classifies right by p_e::

    L = sum_e [ mean over both views of - log p_e(y) + weight r(t) mean over R_e of KL( p_e(. | v) || p_e(. | w) ) ]

No gradient flows into p_e(. | v). r rises from 1 / ramp_epochs in the first epoch to 1, as published. Negative taus
make an expert for frequent classes, those above 1 for rare ones.

Each view has its own statistics of BatchNorm, as in GPaCo and as in the published code on several GPUs, of which each
sees images of one view; on one GPU (CIFAR) it runs both views as one batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from paco_ds.config.loss import LossSettings
from paco_ds.config.methods.mdcs import MdcsSettings
from paco_ds.losses.base import Anchors, Loss, LossOutput, biased_log_softmax, gather_label
from paco_ds.losses.paco import class_prior


class MdcsLoss(Loss):
    """Logit adjustment of each expert, and consistency self-distillation.

    Args:
        log_prior_C: log q.
        settings: of the recipe; see there.
    """

    part_names = ("softmax", "consistency")
    bias_EC: Tensor

    def __init__(self, log_prior_C: Tensor, settings: MdcsSettings) -> None:
        super().__init__()
        tau_E = torch.tensor(settings.taus, dtype=log_prior_C.dtype)
        self.register_buffer("bias_EC", tau_E[:, None] * log_prior_C, persistent=False)
        self.weight, self.ramp_epochs = settings.weight, settings.ramp_epochs
        self.changes_with_epoch = settings.ramp_epochs > 1 and settings.weight > 0
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int) -> None:
        """The weight of the self-distillation in an epoch, counted from 0."""
        self.current_weight = self.weight * min((epoch + 1) / max(self.ramp_epochs, 1), 1.0)

    def forward(self, anchors: Anchors) -> LossOutput:
        """Loss of the experts' logits [E, 2 m, C]: first the weak views of m images, then their strong ones.

        Raises:
            ValueError: another number of experts than taus, or an odd number of views.
        """
        labels_B = anchors.labels_B
        if len(labels_B) % 2:
            raise ValueError(f"MDCS needs two views of each image, got {len(labels_B)} rows")
        with torch.autocast(labels_B.device.type, enabled=False):
            log_p_EBC = biased_log_softmax(anchors.logits, labels_B, self.bias_EC)
            softmax = -gather_label(log_p_EBC, labels_B).mean(1).sum()
            weak_EmC, strong_EmC = log_p_EBC.chunk(2, 1)
            consistency = _divergence_where_right(weak_EmC.detach(), strong_EmC, labels_B[: len(labels_B) // 2])
            parts = {"softmax": softmax.detach(), "consistency": consistency.detach()}
            return LossOutput(softmax + self.current_weight * consistency, parts=parts)


def _divergence_where_right(teacher_EmC: Tensor, student_EmC: Tensor, labels_m: Tensor) -> Tensor:
    """The sum over experts of the mean KL(teacher || student) over the images that the teacher classifies right."""
    divergence_Em = (teacher_EmC.exp() * (teacher_EmC - student_EmC)).sum(2)
    right_Em = teacher_EmC.argmax(2) == labels_m
    return ((divergence_Em * right_Em).sum(1) / right_Em.sum(1).clamp(min=1)).sum()


def make_mdcs(
    settings: MdcsSettings, shared: LossSettings, class_counts: Sequence[int], class_names: Sequence[str] | None
) -> MdcsLoss:
    """MDCS with its settings."""
    return MdcsLoss(class_prior(class_counts, class_names), settings)

"""The loss of RIDE's routers, stage two (Wang et al. 2021): each learns whether a further expert would help.

With r_e the logit of the router after expert e, s the logistic function, and w the weight of positives::

    L = mean_e mean_i [ - w t_e log s(r_e) - (1 - t_e) log(1 - s(r_e)) ],    e = 1 .. E - 1

where t_e is 1 if the mean of experts 1 to e is wrong and that of 1 to e' is right for some e' > e, else 0. The experts
are frozen; no gradient flows into their logits.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from paco_ds.config.loss import LossSettings
from paco_ds.config.methods.routing import RoutingSettings
from paco_ds.losses.base import Anchors, Loss, LossOutput, rows_by_expert


class RoutingLoss(Loss):
    """The mean over routers of their weighted binary cross-entropies.

    Its parts are shares of the decisions: `helps`, those with t_e = 1, and `asks`, those where the router would run the
    next expert at a threshold of one half.

    Args:
        positive_weight: w.

    Raises:
        ValueError: w is not positive.
    """

    part_names = ("helps", "asks")

    def __init__(self, positive_weight: float = 100.0) -> None:
        super().__init__()
        if not positive_weight > 0:
            raise ValueError(f"positive_weight must be above 0, got {positive_weight}")
        self.positive_weight = positive_weight

    def forward(self, anchors: Anchors) -> LossOutput:
        """Loss of the routers' logits [E - 1, B] and the experts' [E, B, C]; float64 if the routers' are, else float32.

        Raises:
            ValueError: no label, logits of fewer than two experts, or not one router for each but the last.
        """
        labels_B, center_logits, routers_RB = anchors.labels_B, anchors.logits, anchors.routers
        if center_logits is None:
            raise ValueError("this loss needs center logits")
        if len(labels_B) == 0:
            raise ValueError("the loss got a micro-batch without images")
        logits_EBC = rows_by_expert("center logits", center_logits, len(labels_B))
        expected = (len(logits_EBC) - 1, len(labels_B))
        if expected[0] < 1:
            raise ValueError(f"routing needs logits of two experts or more [E, B, C], got {tuple(center_logits.shape)}")
        if routers_RB is None or routers_RB.shape != expected:
            shape = None if routers_RB is None else tuple(routers_RB.shape)
            raise ValueError(f"routing needs a logit of each router for each image, {expected}, got {shape}")
        with torch.autocast(labels_B.device.type, enabled=False):
            said_RB = routers_RB if routers_RB.dtype == torch.float64 else routers_RB.float()
            helps_RB = asking_further_helps(logits_EBC.detach(), labels_B).to(said_RB.dtype)
            weight = said_RB.new_tensor(self.positive_weight)
            loss = F.binary_cross_entropy_with_logits(said_RB, helps_RB, pos_weight=weight)
            parts = {"helps": helps_RB.mean(), "asks": (said_RB.detach() > 0).to(said_RB.dtype).mean()}
            return LossOutput(loss, parts=parts)


def asking_further_helps(logits_EBC: Tensor, labels_B: Tensor) -> Tensor:
    """t, bool [E - 1, B]: the mean of the experts so far is wrong, and with further ones it is right."""
    right_EB = logits_EBC.cumsum(0).argmax(2) == labels_B  # the largest of a sum is that of the mean
    right_later_EB = right_EB.flip(0).cummax(0).values.flip(0)
    return ~right_EB[:-1] & right_later_EB[1:]


def make_routing(
    settings: RoutingSettings, shared: LossSettings, class_counts: Sequence[int], class_names: Sequence[str] | None
) -> RoutingLoss:
    """Class counts are ignored: as published, `data.sampler: class_balanced` balances classes."""
    return RoutingLoss(settings.positive_weight)

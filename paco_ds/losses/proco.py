"""Probabilistic contrastive learning, ProCo (Du et al. 2024): contrast with a distribution for every class.

The keys of class c are taken for a von Mises-Fisher distribution of mean direction mu_c and concentration k_c. SupCon's
expectation over infinitely many of them, with pi the class prior and g the log normaliser of `von_mises_fisher`::

    s_c = g(| k_c mu_c + q / temperature |) - g(k_c)
    L   = (logit-adjusted cross-entropy) + weight mean_i - log softmax(s + log pi)_y
    mu_c = S_c / |S_c|,   R_c = |S_c| / n_c,   k_c = D R_c / (1 - R_c^2), at most max_concentration

The paper estimates S_c, the sum of n_c features, over the last epoch and keeps it beside the model. Here it is that of
the queue: nothing further to exchange between ranks or to save, and a queue as long as the training set is an epoch. A
class without a key has k_c = 0, the uniform distribution, where the published code starts from a random direction.

Shapes: E experts, B anchors, C classes, D dimension.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from paco_ds.config.loss import LossSettings
from paco_ds.config.methods.proco import ProCoSettings
from paco_ds.contrast.key_queue import QueueSnapshot
from paco_ds.losses.base import Anchors, Loss, LossOutput, gather_label, rows_by_expert
from paco_ds.losses.paco import ParametricContrastiveLoss, class_prior, general_form
from paco_ds.losses.von_mises_fisher import log_normaliser


class ProCoLoss(Loss):
    """A softmax term over the centers and one over the classes' distributions.

    Args:
        softmax: the term over the centers, `contrast=False`.
        log_prior_C: log pi.
        temperature: of the contrast.
        weight: of the contrast, 1 as published.
        max_concentration: 1e5 as published; reached by a class with a single key.

    Raises:
        ValueError: a softmax term with contrast, or a number that is not positive.
    """

    part_names = ("softmax", "contrast")
    log_prior_C: Tensor

    def __init__(
        self,
        softmax: ParametricContrastiveLoss,
        log_prior_C: Tensor,
        temperature: float,
        weight: float = 1.0,
        max_concentration: float = 1e5,
    ) -> None:
        super().__init__()
        if softmax.contrast or not min(temperature, weight, max_concentration) > 0:
            raise ValueError(
                "ProCo is a softmax term with contrast=False plus a contrast, and needs positive temperature, "
                f"weight and concentration: {softmax.contrast=}, {temperature=}, {weight=}, {max_concentration=}"
            )
        self.softmax, self.temperature, self.weight = softmax, temperature, weight
        self.max_concentration = max_concentration
        self.register_buffer("log_prior_C", log_prior_C, persistent=False)

    def forward(self, anchors: Anchors) -> LossOutput:
        """Loss of logits and queries, and of the queue that the distributions are estimated from; of experts the mean.
        Keys of this step are ignored: they are in the queue of the next one.

        Raises:
            ValueError: queries or queue missing, or of another shape.
        """
        labels_B, query, queue = anchors.labels_B, anchors.queries, anchors.queue
        if query is None or queue is None:
            raise ValueError("ProCo needs queries, and a queue to estimate the classes' distributions from")
        centers: LossOutput = self.softmax(anchors)
        with torch.autocast(labels_B.device.type, enabled=False):
            query_EBD = rows_by_expert("queries", query, len(labels_B)).double()
            log_p_EBC = (self._scores(query_EBD, queue) + self.log_prior_C).log_softmax(2)
            contrast = -gather_label(log_p_EBC, labels_B).mean()
        contrast = contrast.to(centers.loss.dtype)
        parts = {"softmax": centers.loss.detach(), "contrast": contrast.detach()}
        loss = centers.loss + self.weight * contrast
        return LossOutput(loss, centers.center_probability_B, centers.center_optimum_B, parts=parts)

    def _scores(self, query_EBD: Tensor, queue: QueueSnapshot) -> Tensor:
        """s, [E, B, C]."""
        queue.check_current()
        sum_CD = queue.class_sum_CD.double()
        sum_ECD = sum_CD if sum_CD.ndim == 3 else sum_CD[None]
        experts, classes, dim = sum_ECD.shape
        if (experts, classes, dim) != (len(query_EBD), len(self.log_prior_C), query_EBD.shape[2]):
            raise ValueError(
                f"queries {tuple(query_EBD.shape)} of {len(self.log_prior_C)} classes do not fit the queue's class "
                f"sums {tuple(sum_ECD.shape)}"
            )
        length_EC = sum_ECD.norm(dim=2)
        resultant_EC = length_EC / queue.class_count_C.clamp_min(1)
        # a single key has R = 1 but for rounding, which may also take it beyond
        spread_EC = (1 - resultant_EC**2).clamp_min(torch.finfo(torch.float64).tiny)
        concentration_EC = (dim * resultant_EC / spread_EC).clamp_max(self.max_concentration)
        mean_ECD = sum_ECD / length_EC.clamp_min(torch.finfo(torch.float64).tiny)[..., None]
        scaled_EBD = query_EBD / self.temperature
        square_EBC = (
            concentration_EC[:, None] ** 2
            + (scaled_EBD**2).sum(2, keepdim=True)
            + 2 * concentration_EC[:, None] * (scaled_EBD @ mean_ECD.mT)
        )
        # the square of a norm; rounding may take it below 0 where a query points away from its class
        joint_EBC = square_EBC.clamp_min(1e-12).sqrt()
        return log_normaliser(joint_EBC, dim) - log_normaliser(concentration_EC, dim)[:, None]


def make_proco(
    settings: ProCoSettings, shared: LossSettings, class_counts: Sequence[int], class_names: Sequence[str] | None
) -> ProCoLoss:
    """ProCo at the recipe's temperature."""
    prior_C = class_prior(class_counts, class_names)
    softmax = general_form(shared, contrast=False, log_prior_C=prior_C)
    return ProCoLoss(softmax, prior_C, shared.temperature, settings.weight, settings.max_concentration)

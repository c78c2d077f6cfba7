"""Post-hoc logit adjustment of a trained classifier (Menon et al. 2021, Eq. 9): argmax_y z_y - tau log pi_y.

pi is the share of each class among the training images. For a model that was trained without the prior: Balanced
Softmax, PaCo and their like have subtracted it in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from paco_ds.errors import DataError
from paco_ds.evaluation.choose_tau import TAUS
from paco_ds.models.output import ModelOutput


class LogitAdjusted(nn.Module):
    """A model or an ensemble whose mean logits are adjusted.

    Args:
        class_counts: training images of each class; DataError if one has none.
    """

    log_prior_C: Tensor

    def __init__(self, model: nn.Module, class_counts: Sequence[int], tau: float) -> None:
        super().__init__()
        if min(class_counts) < 1:
            raise DataError("--logit-adjust needs training images of every class; a class of data.train_split has none")
        counts_C = torch.tensor(class_counts, dtype=torch.float64)
        self.register_buffer("log_prior_C", (counts_C / counts_C.sum()).log().float())
        self.model, self.tau = model, tau

    def forward(self, images: Tensor) -> ModelOutput:
        output = self.model(images)
        adjusted_BC = output.mean_logits() - self.tau * self.log_prior_C
        return ModelOutput(None, adjusted_BC, experts_used=output.experts_used)

    def logits_of_taus(self, taus: Sequence[float] = TAUS) -> Callable[[Tensor], Iterator[Tensor]]:
        """For `choose_tau`: one forward for all of them."""

        def of_images(images: Tensor) -> Iterator[Tensor]:
            logits_BC = self.model(images).mean_logits()
            return (logits_BC - tau * self.log_prior_C for tau in taus)

        return of_images

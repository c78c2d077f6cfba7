"""What the model gives for a batch: one tuple with names, since ZeRO-3 finds tensors only in tuples."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ModelOutput(NamedTuple):
    """Outputs of `Recogniser.forward`; None where a model or a mode has none. E experts lead where there are any.

    Attributes:
        features: pooled features [B, F].
        logits: center logits [B, C], float32.
        queries: unit rows [B, D], float32, of models with a projection.
        prototypes: unit rows [C, D], the projections of the centers; BCL in training.
        routers: logits of the routers [E - 1, B]; RIDE's second stage in training.
        experts_used: int64 [B], experts that the routers asked; RIDE's second stage in evaluation, where `logits` is
            the mean [B, C] of the experts asked.
    """

    features: Tensor | None
    logits: Tensor
    queries: Tensor | None = None
    prototypes: Tensor | None = None
    routers: Tensor | None = None
    experts_used: Tensor | None = None

    def mean_logits(self) -> Tensor:
        """The model's answer [B, C]: of experts the mean of their logits."""
        return self.logits.mean(0) if self.logits.ndim == 3 else self.logits

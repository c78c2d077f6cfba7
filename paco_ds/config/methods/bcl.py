"""Settings of balanced contrastive learning, BCL (Zhu et al. 2022)."""

from __future__ import annotations

from pydantic import Field

from paco_ds.config.methods.base import Method
from paco_ds.config.section import Positive


class BclSettings(Method):
    """A contrast with class averaging and prototypes beside a logit-adjusted cross-entropy."""

    name = "bcl"
    loss = "paco_ds.losses.bcl:make_bcl"
    contrastive = True
    smooths_labels = True
    uses_prototypes = True

    softmax_weight: Positive = Field(1.0, description="of the logit-adjusted cross-entropy")
    contrast_weight: Positive = Field(0.35, description="of the contrast; ImageNet-LT's")

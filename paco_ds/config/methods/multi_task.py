"""Settings of the multi-task baselines of Tables 13 and 14."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from paco_ds.config.methods.base import Method
from paco_ds.config.section import Fraction, Positive


class MultiTaskSettings(Method):
    """softmax + weight x contrast, each with its own denominator."""

    name = "multi_task"
    loss = "paco_ds.losses.multitask:make_multi_task"
    contrastive = True
    smooths_labels = True

    softmax: Literal["cross_entropy", "balanced_softmax"] = Field("cross_entropy", description="loss of the centers")
    contrast: Literal["reweighted", "balanced_softmax", "supcon"] = Field(
        "reweighted",
        description="SupCon: each anchor weighted by effective numbers, log q added to contrast logits, or as it is",
    )
    weight: Positive = Field(0.1, description="of the contrast; .05 to 1 in Tables 13 and 14")
    beta: Fraction = Field(0.999, lt=1, description="of the effective number of images, for reweighted")

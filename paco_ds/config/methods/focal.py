"""Settings of the focal loss (Lin et al. 2017)."""

from __future__ import annotations

from pydantic import Field

from paco_ds.config.methods.base import Method
from paco_ds.config.section import Fraction, NotNegative


class FocalSettings(Method):
    """Focal loss, with or without class-balanced weights."""

    name = "focal"
    loss = "paco_ds.losses.focal:make_focal"

    gamma: NotNegative = Field(2.0, description="power of 1 - p; 2 as published")
    class_balanced: bool = Field(False, description="weights of effective numbers too (Cui et al. 2019)")
    beta: Fraction = Field(0.9999, lt=1, description="of the effective number of images")

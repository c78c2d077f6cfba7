"""Settings of LDAM and LDAM-DRW (Cao et al. 2019)."""

from __future__ import annotations

from pydantic import Field

from paco_ds.config.methods.base import Method
from paco_ds.config.section import Fraction, Natural, NotNegative, Positive


class LdamSettings(Method):
    """LDAM; with `drw_epoch` LDAM-DRW. Needs `model.centers: cosine`."""

    name = "ldam"
    loss = "paco_ds.losses.ldam:make_ldam"
    reweights_after = "drw_epoch"

    max_margin: NotNegative = Field(0.5, description="of the rarest class, in cosine")
    scale: Positive = Field(30.0, description="of the cosine centers; equal to model.centers_scale")
    drw_epoch: Natural | None = Field(None, description="epochs after which re-weighting begins (DRW); null: never")
    beta: Fraction = Field(0.9999, lt=1, description="of the effective number of images")

    @property
    def margin_scale(self) -> float:
        return self.scale

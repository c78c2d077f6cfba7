"""Settings of RIDE, stage one (Wang et al. 2021)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from paco_ds.config.methods.base import Method
from paco_ds.config.section import Fraction, Natural, NotNegative, Positive


class RideSettings(Method):
    """Loss of experts: each its own, less their divergence from the mean."""

    name = "ride"
    loss = "paco_ds.losses.ride:make_ride"
    min_experts = 1
    reweights_after = "reweight_epoch"

    base: Literal["ldam", "cross_entropy"] = Field("ldam", description="loss of each expert; ldam: cosine centers")
    max_margin: NotNegative = Field(0.5, description="of the rarest class, in cosine")
    scale: Positive = Field(30.0, description="of the cosine centers; equal to model.centers_scale")
    diversity: NotNegative = Field(0.2, description="weight of the experts' divergence from their mean; CIFAR .45")
    temperature: Positive = Field(1.0, description="of that divergence")
    reweight_epoch: Natural | None = Field(
        None, description="epochs after which weights and class-wise temperatures begin; null: never"
    )
    reweight_factor: Fraction = Field(
        0.02, lt=1, description="how far temperatures follow the class counts; iNaturalist .015"
    )
    beta: Fraction = Field(0.9999, lt=1, description="of the effective number of images")

    @property
    def margin_scale(self) -> float | None:
        return self.scale if self.base == "ldam" else None

    def _without_margins(self) -> str:
        return " or loss.ride.base to cross_entropy"

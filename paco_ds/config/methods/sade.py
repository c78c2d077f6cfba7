"""Settings of SADE (Zhang et al. 2022)."""

from __future__ import annotations

from pydantic import Field

from paco_ds.config.methods.base import Method
from paco_ds.config.model import ModelSettings
from paco_ds.config.section import NotNegative


class SadeSettings(Method):
    """Three experts, for the distribution of training, a uniform one and the reverse one."""

    name = "sade"
    loss = "paco_ds.losses.sade:make_sade"
    min_experts = 3

    tau: NotNegative = Field(
        2.0, description="strength of the reverse distribution in the third expert; iNaturalist, Places-LT 1"
    )

    def _check_model(self, model: ModelSettings) -> None:
        super()._check_model(model)
        if model.experts != 3:
            raise ValueError(f"loss.method sade has a loss for each of 3 experts, and model.experts is {model.experts}")

    def _wanted_experts(self) -> str:
        return "3"

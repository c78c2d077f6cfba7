"""Settings of RIDE's routers, stage two (Wang et al. 2021)."""

from __future__ import annotations

from pydantic import Field

from paco_ds.config.methods.base import Method
from paco_ds.config.section import Positive


class RoutingSettings(Method):
    """Loss of routers on frozen experts; needs `model.trained: routers`."""

    name = "routing"
    loss = "paco_ds.losses.routing:make_routing"
    trains_centers = False
    uses_routers = True
    mixes_labels = False  # a router learns from one label whether the experts were right
    min_experts = 2

    positive_weight: Positive = Field(
        100.0, description="of images that a later expert puts right; higher asks more experts; 100 as published"
    )

    def _wanted_experts(self) -> str:
        return "that of the first stage, which must have 2 at least"

"""Settings of BalPoE (Aimar et al. 2023)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from paco_ds.config.methods.base import Method
from paco_ds.config.section import Number


class BalPoESettings(Method):
    """Each expert is trained for a test distribution of its own."""

    name = "balpoe"
    loss = "paco_ds.losses.balpoe:make_balpoe"
    min_experts = 1
    per_expert = "lambdas"

    lambdas: tuple[Annotated[float, Number], ...] = Field(
        (1.0, 0.0, -1.0), min_length=1, description="bias of each expert; their mean is the bias of the model"
    )

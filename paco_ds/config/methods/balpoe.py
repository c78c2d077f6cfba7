"""Settings of BalPoE (Aimar et al. 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from paco_ds.config.methods.base import Method
from paco_ds.config.section import Number

if TYPE_CHECKING:
    from paco_ds.config.recipe import Recipe


class BalPoESettings(Method):
    """Each expert is trained for a test distribution of its own."""

    name = "balpoe"
    loss = "paco_ds.losses.balpoe:make_balpoe"
    min_experts = 1

    lambdas: tuple[Annotated[float, Number], ...] = Field(
        (1.0, 0.0, -1.0), min_length=1, description="bias of each expert; their mean is the bias of the model"
    )

    def check(self, recipe: Recipe) -> None:
        super().check(recipe)
        if len(self.lambdas) != recipe.model.experts:
            raise ValueError(
                f"loss.balpoe.lambdas has {len(self.lambdas)} numbers for {recipe.model.experts} experts; give one each"
            )

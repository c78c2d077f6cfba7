"""One rank of a planned run, as the plans of its memory and of its traffic see it."""

from __future__ import annotations

from dataclasses import dataclass

from paco_ds.config.recipe import Recipe
from paco_ds.distributed.ranks import MicroBatchLayout
from paco_ds.planning.trace import StepTrace

FLOAT = 4  # bytes


@dataclass(frozen=True)
class PlannedRank:
    """A rank that trains a recipe.

    Attributes:
        trace: of one of its micro-batches.
        classes: of the training split.
        layout: its share of the step.
    """

    recipe: Recipe
    trace: StepTrace
    classes: int
    layout: MicroBatchLayout

    @property
    def image_bytes(self) -> int:
        """Of one view of a training image."""
        return 3 * self.recipe.views.query.size**2

    @property
    def trained_bytes(self) -> int:
        """Of all trained weights, float32."""
        return FLOAT * sum(self.trace.trained)

    @property
    def exchanges_images(self) -> bool:
        """Whether key images are exchanged between ranks (ShuffleBN), one step ahead."""
        return self.trace.shuffles_keys and self.layout.world_size > 1

"""Settings of MDCS (Zhao et al. 2023)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from paco_ds.config.methods.base import Method
from paco_ds.config.section import Natural, NotNegative, Number


class MdcsSettings(Method):
    """Experts with a bias each; the predictions on the query's view are distilled into those on the key's."""

    name = "mdcs"
    loss = "paco_ds.losses.mdcs:make_mdcs"
    uses_both_views = True
    mixes_labels = False
    min_experts = 1
    per_expert = "taus"

    taus: tuple[Annotated[float, Number], ...] = Field(
        (-0.5, 1.0, 2.5), min_length=1, description="strength of log prior on the logits of each expert"
    )
    weight: NotNegative = Field(0.6, description="of the self-distillation")
    ramp_epochs: Natural = Field(20, description="epochs over which that weight rises to its value; 0: from the start")

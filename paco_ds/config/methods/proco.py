"""Settings of probabilistic contrastive learning, ProCo (Du et al. 2024)."""

from __future__ import annotations

from pydantic import Field

from paco_ds.config.methods.base import Method
from paco_ds.config.section import Positive


class ProCoSettings(Method):
    """Contrast with a von Mises-Fisher distribution for every class, estimated from the queue."""

    name = "proco"
    loss = "paco_ds.losses.proco:make_proco"
    contrastive = True
    smooths_labels = True
    uses_queue = True

    weight: Positive = Field(1.0, description="of the contrast")
    max_concentration: Positive = Field(1e5, description="of a class's distribution, reached by a single key")

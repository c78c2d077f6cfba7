"""Long-tailed image recognition with PaCo at cluster scale."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from paco_ds.evaluation.predictor import Predictor

__version__ = "0.19.0"


def load(
    run: str | os.PathLike[str], device: str = "cpu", weights: Literal["query", "key", "ema"] | None = None
) -> Predictor:
    """The trained model of a run directory, see :func:`paco_ds.evaluation.predictor.load`."""
    from paco_ds.evaluation import predictor  # torch: only who asks for it waits

    return predictor.load(run, device, weights)

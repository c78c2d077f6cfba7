"""Names of the weights that follow others: those of the key encoder and of the average for evaluations."""

from __future__ import annotations

from typing import Literal

from torch import nn

KEY_ENCODER, AVERAGE = "key_encoder.", "average."  # names of weights that follow others begin with these
Weights = Literal["query", "key", "ema"]
"""Which weights are evaluated, see `evaluation.weights`."""


def source_of(name: str) -> str:
    """The weight that a moving average follows, by its name; the name itself of what is no average."""
    if name.startswith(KEY_ENCODER):
        return "query_encoder." + name.removeprefix(KEY_ENCODER)
    return name.removeprefix(AVERAGE)


def average_of(name: str, average: str) -> str | None:
    """The inverse: the name in `average` (KEY_ENCODER or AVERAGE) of a weight that it follows; None of others."""
    if average == AVERAGE:
        return AVERAGE + name if name.startswith(("query_encoder.backbone.", "centers.")) else None
    inside = name.removeprefix("query_encoder.")
    return None if inside == name else KEY_ENCODER + inside


def frozen_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is not trained, by name, averages left out."""
    return {n: p for n, p in model.named_parameters() if not p.requires_grad and source_of(n) == n}

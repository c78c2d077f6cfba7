"""Settings of supervised contrastive learning, the first of two stages (Khosla et al. 2020)."""

from __future__ import annotations

from paco_ds.config.methods.base import Method


class SupConMethod(Method):
    """Contrast alone; a classifier is trained afterwards with `model.trained: centers`."""

    name = "supcon"
    loss = "paco_ds.losses.supcon:make_supcon"
    contrastive = True
    trains_centers = False

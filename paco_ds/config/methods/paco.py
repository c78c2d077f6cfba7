"""Settings of PaCo (Cui et al. 2021), and of GPaCo with `key_encoder: none`; all are shared, see `LossSettings`."""

from __future__ import annotations

from paco_ds.config.methods.base import Method


class PaCoMethod(Method):
    """Parametric contrastive learning: contrast and centers in one denominator, Eq. (4)."""

    name = "paco"
    loss = "paco_ds.losses.paco:make_paco"
    contrastive = True
    smooths_labels = True

"""Settings of the losses that are one softmax over the centers; see `paco_ds.losses.cross_entropy`."""

from __future__ import annotations

from pydantic import Field

from paco_ds.config.methods.base import Method
from paco_ds.config.section import Fraction, NotNegative


class CrossEntropyMethod(Method):
    """Plain cross-entropy."""

    name = "cross_entropy"
    loss = "paco_ds.losses.cross_entropy:make_cross_entropy"
    smooths_labels = True


class BalancedSoftmaxMethod(Method):
    """Balanced Softmax (Ren et al. 2020)."""

    name = "balanced_softmax"
    loss = "paco_ds.losses.cross_entropy:make_balanced_softmax"
    smooths_labels = True


class LogitAdjustmentSettings(Method):
    """Logit adjustment (Menon et al. 2021)."""

    name = "logit_adjustment"
    loss = "paco_ds.losses.cross_entropy:make_logit_adjustment"
    smooths_labels = True

    tau: NotNegative = Field(1.0, description="times log q(y); 1 as published")


class ClassBalancedSettings(Method):
    """Class-balanced cross-entropy (Cui et al. 2019)."""

    name = "class_balanced"
    loss = "paco_ds.losses.cross_entropy:make_class_balanced"
    smooths_labels = True

    beta: Fraction = Field(0.9999, lt=1, description="of the effective number of images (1 - beta^n) / (1 - beta)")

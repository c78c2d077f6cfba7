"""Supervised contrastive learning, stage one of two: contrast alone, no centers are trained.

Eq. (3) of the paper (Khosla et al. 2020), with A(i) the other queries, the keys and the queue, P(i) those of A(i)
with the anchor's label::

    L_i = - 1 / |P(i)| sum_P(i) log(exp(q_i.k_j / temperature) / sum_A(i) exp(q_i.k / temperature))

("summed" leaves out 1 / |P(i)|). The centers of such a run keep their initial weights: a classifier is trained on the
frozen backbone afterwards.
"""

from collections.abc import Sequence
from typing import Any

from paco_ds.config.loss import LossSettings
from paco_ds.config.methods.base import Method
from paco_ds.losses.paco import ParametricContrastiveLoss, general_form


def make_supcon(
    settings: Method, shared: LossSettings, class_counts: Sequence[int], class_names: Sequence[str] | None
) -> ParametricContrastiveLoss:
    """SupCon at the recipe's temperature; class counts are ignored."""
    return contrast_alone(shared)


def contrast_alone(shared: LossSettings, **differs: Any) -> ParametricContrastiveLoss:
    """The contrast term of the general form, at the recipe's temperature; gamma would only add a constant."""
    return general_form(shared, **({"centers": False, "alpha": 1.0, "beta": 0.0, "gamma": 1.0} | differs))

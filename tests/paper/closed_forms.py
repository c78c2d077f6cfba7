"""Closed forms of the paper against which the losses are tested: Remarks 1 and 2, Eq. (12), (17) and (18)."""

import numpy as np

from paco_ds.paper.equations import Number, supcon_optimum

__all__ = ["center_gradient_scale", "paco_minimum", "paco_optimum", "supcon_minimum", "supcon_optimum"]


def paco_optimum(positives: Number, alpha: float) -> tuple[Number, Number]:
    """Remark 2: (p+, p_c) = (alpha, 1) / (1 + alpha K_y), the probabilities of each positive and of the
    label's center where the PaCo loss is smallest."""
    return alpha / (1 + alpha * positives), 1 / (1 + alpha * positives)


def supcon_minimum(positives: Number, p_sum: float = 1.0) -> Number:
    """Eq. (12): -K_y log(p_sum / K_y), the least SupCon loss of an anchor with p_sum on its positives."""
    return -positives * np.log(p_sum / positives)


def paco_minimum(positives: Number, alpha: float, p_sum: float = 1.0) -> Number:
    """Eq. (17): the least PaCo loss of an anchor with p_sum on its positives and center in all; alpha > 0."""
    p_positive, p_center = paco_optimum(positives, alpha)
    return -np.log(p_sum * p_center) - alpha * positives * np.log(p_sum * p_positive)


def center_gradient_scale(p_center: Number, alpha: float, positives: Number, own: bool) -> Number:
    """Eq. (18): the factor f in dL_i / dc_k = f x_i, f = (alpha K* + 1) p_ck - [y_i = k], in the summed form.

    Args:
        p_center: p_ck, the probability of center k.
        alpha: weight of a positive.
        positives: K*, the anchor's positives.
        own: whether k is the anchor's class.
    """
    return (alpha * positives + 1) * p_center - float(own)

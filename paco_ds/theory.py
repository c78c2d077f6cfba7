"""Owns the paper's closed forms: what the losses reach at their optimum, and how strongly they pull.

Eq. (9)-(18) of the supplementary material of "Parametric Contrastive Learning". They hold for the summed
form; the published normalisation has the same optima. Arguments may be floats or numpy arrays.
"""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Number = TypeVar("Number", float, NDArray[np.float64])


def expected_positives(class_prior: Number, queue_length: int, micro_batch: int) -> Number:
    """Eq. (9): K_y = q(y) (queue length + 2 m - 1), positives that an anchor of class y meets on average.

    Images are taken as drawn independently. For the rarest classes this is far too low, since an anchor's own
    key is always a positive: to watch training use the exact `LossOutput.center_optimum_B`.

    Args:
        class_prior: q(y), the class's share of the training images.
        queue_length: filled slots of the queue.
        micro_batch: m, anchors that meet each other and their keys.
    """
    return class_prior * (queue_length + 2 * micro_batch - 1)


def supcon_optimum(positives: Number) -> Number:
    """Remark 1: p+ = 1 / K_y, the probability of each positive where the SupCon loss is smallest."""
    return 1 / positives


def paco_optimum(positives: Number, alpha: float) -> tuple[Number, Number]:
    """Remark 2: (p+, p_c) = (alpha, 1) / (1 + alpha K_y), the probabilities of each positive and of the own
    center where the PaCo loss is smallest."""
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

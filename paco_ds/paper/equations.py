"""Closed forms of the paper: positives of an anchor, and the optima of SupCon and PaCo.

Eq. (9), Remarks 1 and 2 of "Parametric Contrastive Learning". They hold for the summed form; the published
normalisation has the same optima. Arguments may be floats or numpy arrays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Number = TypeVar("Number", float, Floats)


def expected_positives(class_prior: Number, queue_length: int, micro_batch: int) -> Number:
    """Eq. (9): K_y = q(y) (queue length + 2 m - 1), positives that an anchor of class y meets on average.

    It counts an anchor's own key as if it were drawn like any other. As that one is always a positive, Eq. (9) is
    far too low for the rarest classes; :func:`positives_distribution` is exact.

    Args:
        class_prior: q(y), the class's share of the training images.
        queue_length: filled slots of the queue.
        micro_batch: m, anchors that meet each other and their keys.
    """
    return class_prior * (queue_length + 2 * micro_batch - 1)


def positives_distribution(class_prior: float, queue_length: int, micro_batch: int) -> tuple[Floats, Floats]:
    """How many positives an anchor of a class meets, and how probably, where images are drawn independently.

    Its own key is one of them for certain. Each of the m - 1 other images of the micro-batch brings two, its query
    and its key, with probability q(y); each key of the queue is one with probability q(y). The mean is
    1 + q(y) (queue length + 2 m - 2).

    Args:
        class_prior: q(y) in (0, 1].
        queue_length: filled slots of the queue, at least 0.
        micro_batch: m, at least 1.

    Returns:
        (K, probability), each [P]: whole numbers from 1 in order, and probabilities that sum to 1. Numbers too far
        from the mean to have a probability above 1e-20 are left out.

    Raises:
        ValueError: an argument out of range.
    """
    if not 0 < class_prior <= 1 or queue_length < 0 or micro_batch < 1:
        raise ValueError(
            f"class_prior must be in (0, 1], queue_length at least 0, micro_batch at least 1: "
            f"{class_prior=}, {queue_length=}, {micro_batch=}"
        )
    in_queue, p_queue = _binomial(queue_length, class_prior)
    in_batch, p_batch = _binomial(micro_batch - 1, class_prior)
    p_pairs = np.zeros(2 * len(p_batch) - 1)  # images come with query and key: every other number
    p_pairs[::2] = p_batch
    probability = np.convolve(p_queue, p_pairs)
    first = 1 + in_queue[0] + 2 * in_batch[0]
    return first + np.arange(len(probability), dtype=np.float64), probability


def supcon_optimum(positives: Number) -> Number:
    """Remark 1: p+ = 1 / K_y, the probability of each positive where the SupCon loss is smallest."""
    return 1 / positives


@dataclass(frozen=True)
class Optima:
    """Optima of the losses, for each of C classes and A values of alpha; all float64.

    Attributes:
        positives_C: K_y.
        supcon_C: p+ of SupCon.
        positive_AC, center_AC: p+ and p_c of PaCo.
    """

    positives_C: Floats
    supcon_C: Floats
    positive_AC: Floats
    center_AC: Floats


def optima_by_equation_9(prior_C: Floats, alphas_A: Floats, queue_length: int, micro_batch: int) -> Optima:
    """Remarks 1 and 2 with K_y of Eq. (9). A SupCon "probability" above 1 shows where Eq. (9) does not hold."""
    positives_C = expected_positives(prior_C, queue_length, micro_batch)
    center_AC = 1 / (1 + np.outer(alphas_A, positives_C))
    return Optima(positives_C, supcon_optimum(positives_C), alphas_A[:, None] * center_AC, center_AC)


def mean_optima(prior_C: Floats, alphas_A: Floats, queue_length: int, micro_batch: int) -> Optima:
    """Means of K_y and of Remarks 1 and 2 over :func:`positives_distribution`.

    They are what training logs as optimum, where the queue is full and images are drawn independently: the optimum
    of each anchor for the positives it met, averaged over anchors.
    """
    priors, class_of = np.unique(prior_C, return_inverse=True)
    alphas_A1 = alphas_A[:, None]
    positives, supcon, center = [], [], []
    for prior in priors:
        K, probability = positives_distribution(float(prior), queue_length, micro_batch)
        positives.append(K @ probability)
        supcon.append(supcon_optimum(K) @ probability)
        center.append((1 / (1 + alphas_A1 * K)) @ probability)
    center_AC = np.stack(center, axis=1)[:, class_of]
    return Optima(np.array(positives)[class_of], np.array(supcon)[class_of], alphas_A1 * center_AC, center_AC)


def _binomial(draws: int, probability: float) -> tuple[Floats, Floats]:
    """Successes that are not far too improbable, in order, and their probabilities."""
    if draws == 0 or probability == 1:
        return np.array([float(draws)]), np.ones(1)
    mean = draws * probability
    spread = 12 * math.sqrt(mean * (1 - probability)) + 30
    k = np.arange(max(0, math.floor(mean - spread)), min(draws, math.ceil(mean + spread)) + 1, dtype=np.float64)
    # from each to the next the probability changes by (n - k) / (k + 1) odds: no factorial of a million
    odds = probability / (1 - probability)
    log_p = np.concatenate([[0.0], np.cumsum(np.log((draws - k[:-1]) / (k[:-1] + 1) * odds))])
    p = np.exp(log_p - log_p.max())
    return k, p / p.sum()

"""Owns the plain transcription of Eq. (4) that the loss is tested against: anchor by anchor, term by term."""

import math

import torch
from torch import Tensor

Term = tuple[Tensor, float, float]
"""One z of A(i) and C: its logit, its factor in the denominator, its weight w(z)."""


def parametric_contrastive_loss(
    labels: Tensor,
    logits: Tensor | None,
    query: Tensor | None,
    key: Tensor | None,
    queue_keys: Tensor,
    queue_labels: Tensor,
    *,
    alpha: float,
    temperature: float,
    beta: float = 1.0,
    gamma: float = 1.0,
    supt: float = 1.0,
    smoothing: float = 0.0,
    normalization: str = "published",
    log_prior: Tensor | None = None,
    contrast_bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    contrast: bool = True,
    centers: bool = True,
    other_queries: Tensor | None = None,
) -> Tensor:
    """Mean over anchors of -sum_z w(z) log(exp(z) / denominator), each divided by sum_z w(z) if "published".

    `other_queries` stands in for the queries in their role as contrasts, to see what detaching them does.
    """
    other_queries = query if other_queries is None else other_queries
    total = torch.zeros((), dtype=torch.float64)
    for i, label in enumerate(labels.tolist()):
        terms: list[Term] = []
        if centers:
            assert logits is not None
            num_classes = logits.shape[1]
            for c in range(num_classes):
                prior = 0.0 if log_prior is None else log_prior[c].double()
                weight = 1 - smoothing if c == label else smoothing / (num_classes - 1)
                terms.append(((logits[i, c] + prior) / supt, 1.0, beta * weight))
        if contrast:
            assert query is not None
            assert other_queries is not None
            rows = [(other_queries[j], labels[j]) for j in range(len(labels)) if j != i]
            rows += [] if key is None else list(zip(key, labels, strict=True))
            rows += list(zip(queue_keys, queue_labels, strict=True))
            for row, row_label in rows:
                weight = alpha if int(row_label) == label else 0.0
                bias = 0.0 if contrast_bias is None else contrast_bias[row_label].double()
                terms.append((query[i] @ row / temperature + bias, gamma, weight))
        anchor_weight = 1.0 if class_weight is None else class_weight[label].double()
        total = total + anchor_weight * anchor_loss(terms, normalization)
    return total / len(labels)


def anchor_loss(terms: list[Term], normalization: str) -> Tensor:
    """-sum_z w(z) (z - log denominator) of one anchor; 0 for an anchor without weight."""
    largest = max(z.item() for z, factor, _ in terms if factor > 0)
    denominator = sum((factor * (z - largest).exp() for z, factor, _ in terms if factor > 0), torch.zeros(()))
    log_denominator = largest + denominator.log()
    loss = torch.zeros((), dtype=torch.float64)
    for z, _, weight in terms:
        if weight > 0:
            loss = loss - weight * (z - log_denominator)
    weights = math.fsum(weight for _, _, weight in terms)
    return loss / weights if normalization == "published" and weights > 0 else loss

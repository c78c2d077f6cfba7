"""tau-normalisation of a trained classifier (Kang et al. 2020): w_c / ||w_c||^tau, no bias, tau chosen on validation.

Long-tailed training gives frequent classes longer weights; tau between 0 and 1 reduces this without training.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from paco_ds.data.stream.load import Replaced
from paco_ds.distributed.ranks import Ranks
from paco_ds.errors import RecipeError
from paco_ds.evaluation.accuracy import ClassCounts
from paco_ds.evaluation.split import EvaluationSplit
from paco_ds.models.recogniser import Recogniser

TAUS = tuple(step / 10 for step in range(11))


def normalized_weight(weight_CF: Tensor, tau: float) -> Tensor:
    """w_c / ||w_c||^tau [C, F]: unchanged at tau 0, unit rows at tau 1."""
    return weight_CF / weight_CF.norm(dim=1, keepdim=True) ** tau


def tau_normalized(model: Recogniser, tau: float) -> Recogniser:
    """A copy of the model whose centers are normalised with tau and have no bias.

    Raises:
        RecipeError: its centers are not linear, or it has experts.
    """
    model = copy.deepcopy(model)
    centers = _linear_centers(model)
    with torch.no_grad():
        centers.weight.copy_(normalized_weight(centers.weight, tau))
        centers.bias.zero_()
    return model


@torch.no_grad()
def choose_tau(
    model: Recogniser, split: EvaluationSplit, ranks: Ranks, taus: Sequence[float] = TAUS
) -> tuple[float, dict[float, float]]:
    """(tau with the best balanced accuracy on a split, accuracy by tau); features are computed once.

    Raises:
        RecipeError: as :func:`tau_normalized`.
    """
    weights = [normalized_weight(_linear_centers(model).weight, tau) for tau in taus]
    counts = [ClassCounts.zeros(len(split.shots), ranks.device) for _ in taus]
    model.eval()
    bad: list[Replaced] = []
    for batch in split.batches(ranks):
        bad += batch.replaced
        feature_BF = model.query_encoder.backbone(model.normalize(batch.query.to(ranks.device)))
        labels, valid = batch.labels.to(ranks.device), batch.valid.to(ranks.device)
        for weight_CF, counted in zip(weights, counts, strict=True):
            counted.add(feature_BF @ weight_CF.T, labels, valid)
    split.left_out(bad, ranks)
    totals = ranks.sum(torch.stack([c.as_tensor() for c in counts]))
    balanced = {tau: _balanced(ClassCounts.from_tensor(total)) for tau, total in zip(taus, totals, strict=True)}
    return max(taus, key=lambda tau: balanced[tau]), balanced


def _balanced(counts: ClassCounts) -> float:
    present_C = counts.total_C > 0
    return float((counts.correct1_C[present_C] / counts.total_C[present_C]).mean())


def _linear_centers(model: Recogniser) -> nn.Linear:
    if not isinstance(model.centers, nn.Linear):
        raise RecipeError(
            "tau-normalisation needs one linear classifier: set model.centers to linear, model.experts to null, and "
            "model.trained not to center_scales"
        )
    return model.centers

"""tau-normalisation of a trained classifier (Kang et al. 2020): w_c / ||w_c||^tau, no bias, tau chosen on validation.

Long-tailed training gives frequent classes longer weights; a tau above 0 reduces this without training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from paco_ds.errors import RecipeError
from paco_ds.evaluation.choose_tau import TAUS
from paco_ds.models.recogniser import Recogniser


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


def logits_of_taus(model: Recogniser, taus: Sequence[float] = TAUS) -> Callable[[Tensor], Iterator[Tensor]]:
    """For `choose_tau`: features are computed once for all of them.

    Raises:
        RecipeError: as :func:`tau_normalized`.
    """
    weights = [normalized_weight(_linear_centers(model).weight, tau) for tau in taus]

    def of_images(images: Tensor) -> Iterator[Tensor]:
        feature_BF = model.feature(images)
        return (feature_BF @ weight_CF.T for weight_CF in weights)

    return of_images


def _linear_centers(model: Recogniser) -> nn.Linear:
    if not isinstance(model.centers, nn.Linear):
        raise RecipeError(
            "tau-normalisation needs one linear classifier: set model.centers to linear, model.experts to null, and "
            "model.trained not to center_scales"
        )
    return model.centers

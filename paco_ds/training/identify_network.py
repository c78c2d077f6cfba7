"""Which network a file of weights belongs to: by timm's config.json, or by the shapes of torchvision's networks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torchvision
from torch import Tensor

from paco_ds.errors import RecipeError
from paco_ds.training.published import NETWORK, STATISTICS, Published

_SETTING = "model.backbone="


def backbone_of(published: Published, overrides: Sequence[str]) -> list[str]:
    """The overrides of `model.backbone` and its arguments that a file asks for.

    None of them where the user gave one or nothing is recognised: [].

    Raises:
        RecipeError: several of torchvision's networks have these shapes.
    """
    if published.kind != "network" or any(override.startswith(_SETTING) for override in overrides):
        return []
    if published.timm_name:
        # sizes of images are those of the recipe's views
        arguments = {name: value for name, value in published.timm_arguments.items() if name != "img_size"}
        given = [f"model.kwargs={json.dumps(arguments)}"] if arguments else []
        return [f"{_SETTING}timm:{published.timm_name}", *given]
    names = _of_torchvision({name.removeprefix(NETWORK): t for name, t in published.model.items()})
    if len(names) > 1:
        raise RecipeError(f"these weights fit {' and '.join(names)}: set model.backbone to the one they are of")
    return [f"{_SETTING}{name}" for name in names]


def _of_torchvision(weights: Mapping[str, Tensor]) -> list[str]:
    """Names of the classifiers whose tensors, but for the number of classes, have these names and shapes."""
    counts = _possible_counts(weights)
    return [
        name
        for name in torchvision.models.list_models(module=torchvision.models)
        if torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"] in counts and _fits(name, weights)
    ]


def _possible_counts(weights: Mapping[str, Tensor]) -> set[int]:
    """Numbers of parameters of this network with 1000 classes, whichever of its linear layers is the classifier."""
    total = sum(t.numel() for name, t in weights.items() if name.rpartition(".")[2] not in STATISTICS)
    linear = (t.shape for name, t in weights.items() if t.ndim == 2 and name.endswith(".weight"))
    return {total + (1000 - classes) * (features + 1) for classes, features in linear}


def _fits(name: str, weights: Mapping[str, Tensor]) -> bool:
    network = torchvision.models.get_model(name, weights=None).state_dict()
    return network.keys() == weights.keys() and all(_same_but_classes(t, weights[key]) for key, t in network.items())


def _same_but_classes(theirs: Tensor, ours: Tensor) -> bool:
    return theirs.shape == ours.shape or (theirs.shape[:1] == (1000,) and theirs.shape[1:] == ours.shape[1:])

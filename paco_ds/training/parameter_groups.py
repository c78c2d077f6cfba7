"""Groups of an optimizer's parameters: which are decayed, and the learning rate of each depth of the network."""

from __future__ import annotations

from typing import Any

from paco_ds.config.optimizer import OptimizerSettings
from paco_ds.errors import RecipeError
from paco_ds.models.recogniser import Recogniser

LR_FACTOR = "lr_factor"  # entry of a group: its learning rate over that of the schedule
MUON = "muon"  # entry of a group: whether its weights are matrices that Muon steps
_BACKBONE = "query_encoder.backbone."


def parameter_groups(model: Recogniser, settings: OptimizerSettings) -> list[dict[str, Any]]:
    """The trained parameters in groups of one weight decay and one factor of the learning rate, as torch's optimizers
    take them: one group, unless the settings tell parameters apart.

    Raises:
        RecipeError: layer_decay on a network that does not say how deep its layers are.
    """
    factors = _lr_factors(model, settings.layer_decay)
    undecayed = {_BACKBONE + name for name in model.query_encoder.backbone.not_decayed()}
    matrices = hidden_matrices(model) if settings.name == "muon" else set()
    groups: dict[tuple[float, float, bool], list[Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = settings.decay_norms_and_biases or (parameter.ndim > 1 and name not in undecayed)
        key = factors.get(name, 1.0), settings.weight_decay if decayed else 0.0, name in matrices
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, LR_FACTOR: factor, MUON: is_matrix}
        for (factor, decay, is_matrix), parameters in groups.items()
    ]


def hidden_matrices(model: Recogniser) -> set[str]:
    """Trained weights that Muon steps: matrices and convolutions of the query encoder, but for what embeds pixels and
    positions. Classifier, centers, norms and biases are none."""
    undecayed = model.query_encoder.backbone.not_decayed()
    return {
        f"query_encoder.{name}"
        for name, parameter in model.query_encoder.named_parameters()
        if parameter.requires_grad
        and parameter.ndim in (2, 4)
        and not (parameter.ndim == 4 and parameter.shape[1] == 3)  # red, green and blue
        and name.removeprefix("backbone.") not in undecayed
    }


def _lr_factors(model: Recogniser, decay: float) -> dict[str, float]:
    """decay^(depths below the heads) of the backbone's parameters; heads have 1, and are not named."""
    if decay == 1:
        return {}
    backbone = model.query_encoder.backbone
    depths = backbone.depth_groups()
    if depths is None:
        raise RecipeError(
            f"optimizer.layer_decay {decay:g}: this backbone does not say how deep its layers are: set layer_decay to "
            "1, or model.backbone to a network of timm, as timm:vit_base_patch16_224"
        )
    head = backbone.head_depth()
    return {_BACKBONE + name: decay ** (head - depth) for name, depth in depths.items()}

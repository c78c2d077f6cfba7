"""Where training starts from: the run of a first stage, a file of weights, or published ones; and what stays frozen."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from paco_ds.checkpoint import open_run
from paco_ds.config.model import ModelSettings
from paco_ds.errors import RecipeError
from paco_ds.models.adapters import is_added
from paco_ds.models.backbones import Backbone, make_backbone
from paco_ds.models.families import USUAL_SIZES, ImageSizes
from paco_ds.models.recogniser import Recogniser
from paco_ds.training.initial_centers import read_embeddings
from paco_ds.training.pretrained import is_published, published_weights
from paco_ds.training.weight_files import is_hub_folder, read_tensors, state_dict_of, weights_file
from paco_ds.training.weight_mapping import Fit, fill_backbone, fit_backbone, needs_whole

_SAME = ("backbone", "kwargs", "width", "experts", "expert_width")  # what the first stage must share
_SAME_CENTERS = ("centers", "centers_scale")  # and where its centers are taken over as they are
_BACKBONE = "query_encoder.backbone."


def load_initial_weights(model: Recogniser, settings: ModelSettings, sizes: ImageSizes = USUAL_SIZES) -> Fit | None:
    """Put what `model.start_from` names into the encoders of a fresh model, in place.

    Of a run: backbone and projection, and for `trained: center_scales` and `routers` its centers; of a file or of
    published weights: the backbone. The key encoder starts from the query encoder's weights.

    Args:
        sizes: of the views, with which the backbone was made.

    Returns:
        what became of the tensors of a file; None of a run, whose tensors all fit, and without `start_from`.

    Raises:
        RecipeError: nothing there, or weights of another network, naming what differs.
    """
    start = settings.start_from
    if start is None:
        return None
    path = Path(start)
    # a file of a hub's cache has no ending; what is not there is a file by its ending
    may_be_run = path.is_dir() or not (path.suffix or path.is_file())
    is_run = may_be_run and not is_published(start) and not is_hub_folder(path)
    if settings.trained in ("center_scales", "routers") and not is_run:
        raise RecipeError(
            f"model.trained {settings.trained} needs trained centers too, which {start} has not: let model.start_from "
            f"be the run directory of a first stage"
        )
    if is_run:
        _fill_from_run(model, settings, path)
        return None
    backbone = model.query_encoder.backbone
    tensors = published_weights(start, settings.backbone) if is_published(start) else _of_file(path)
    whole = _whole_network(backbone, settings, sizes)
    fit = fill_backbone(backbone, whole, tensors, settings.start_from_min_share, f"model.start_from {start}")
    model.restart_key_encoder()
    return fit


def check_files(settings: ModelSettings, sizes: ImageSizes, class_names: Sequence[str]) -> None:
    """Read what `model.start_from` and `model.centers_from` name, where they are files that are there, as a training
    would: without its model.

    Args:
        class_names: of the shards; empty where there are none yet.

    Raises:
        RecipeError: weights of another network, or embeddings of other classes or in another order.
    """
    weights, rows = Path(settings.start_from or ""), Path(settings.centers_from or "")
    has_weights = weights.is_file() or is_hub_folder(weights)
    if not has_weights and not rows.is_file():
        return
    with torch.device("meta"):
        backbone = make_backbone(settings, sizes)
        whole = _whole_network(backbone, settings, sizes)
    if has_weights:
        least, where = settings.start_from_min_share, f"model.start_from {weights}"
        fit_backbone(backbone, whole, _of_file(weights), least, where)
    if rows.is_file() and class_names:
        read_embeddings(rows, class_names, backbone.feature_dim)


def _whole_network(backbone: Backbone, settings: ModelSettings, sizes: ImageSizes) -> nn.Module:
    """The backbone's network as files have it: neither cut into experts nor with adapters."""
    if not needs_whole(backbone) and settings.adapters is None:
        return backbone.network
    return make_backbone(settings.model_copy(update={"experts": None, "trained": "all"}), sizes).network


def require_same_network(first: ModelSettings, second: ModelSettings, run: str | Path) -> None:
    """Raise RecipeError, naming what differs, if a second stage cannot take over the weights of the first, in `run`."""
    differing = [
        f"{name} {getattr(first, name)!r} there, {getattr(second, name)!r} here"
        for name in (*_SAME, *(_SAME_CENTERS if second.trained == "routers" else ()))
        if getattr(first, name) != getattr(second, name)
    ]
    if first.adapters is not None and first.adapters != second.adapters:
        differing.append(f"trained {first.trained} with {first.adapters!r} there, {second.trained} here")
    if differing:
        raise RecipeError(f"model.start_from {run} was trained with another network: {'; '.join(differing)}")


def freeze(model: Recogniser, settings: ModelSettings) -> None:
    """Leave gradients to what `model.trained` names, and to projection and centers, in place.

    Raises:
        RecipeError: the network has nothing of that kind, or keys would be made with other statistics than queries.
    """
    backbone, trained = model.query_encoder.backbone, settings.trained
    if trained in ("centers", "center_scales", "routers"):
        normalises = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in backbone.modules())
        if normalises and model.key_encoder is not None and settings.frozen_batch_norm == "evaluation":
            raise RecipeError(
                f"model.trained {trained} with a key encoder: frozen BatchNorm would normalise queries with its own "
                "statistics, and keys with those of a batch; set model.frozen_batch_norm=training, or key_encoder=none"
            )
        model.freeze_backbone(settings.frozen_batch_norm)  # centers that are not trained never had a gradient
    elif trained != "all":
        parts = _trained_parts(backbone.network, settings)
        for parameter in backbone.parameters():
            parameter.requires_grad_(parameter.requires_grad and parameter in parts)


def _trained_parts(network: nn.Module, settings: ModelSettings) -> set[nn.Parameter]:
    """The parameters of a backbone that `last_block`, `norms`, `biases`, `lora` or `adaptformer` trains."""
    trained = settings.trained
    if trained == "last_block":
        stage = getattr(network, "layer4", None)
        if not isinstance(stage, nn.Sequential):
            raise RecipeError(f"model.trained last_block needs a ResNet or ResNeXt, not {settings.backbone}")
        batch_norms = (m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        return {parameter for part in (stage[-1], *batch_norms) for parameter in part.parameters()}
    if trained == "norms":  # timm's and torch's classes have it in their name
        norms = (m for m in network.modules() if "Norm" in type(m).__name__)
        parts = {parameter for norm in norms for parameter in norm.parameters(recurse=False)}
    elif trained == "biases":
        parts = {parameter for name, parameter in network.named_parameters() if name.endswith("bias")}
    else:
        parts = {parameter for name, parameter in network.named_parameters() if is_added(name)}
    if not parts:
        raise RecipeError(f"model.trained {trained}: {settings.backbone} has none; set it to centers, or to all")
    return parts


def _fill_from_run(model: Recogniser, settings: ModelSettings, run: Path) -> None:
    first, checkpoint = open_run(run, "model.start_from", "name the folder where it is")
    require_same_network(first.model, settings, run)
    weights = checkpoint.model()
    encoder = {
        name.removeprefix("query_encoder."): tensor
        for name, tensor in weights.items()
        if name.startswith(_BACKBONE) or (name.startswith("query_encoder.projection.") and model.has_projection)
    }
    drawn = {name for name in model.query_encoder.state_dict() if name.startswith("projection.") or is_added(name)}
    _copy(model.query_encoder, encoder, f"model.start_from {run}", may_be_missing=drawn)
    if settings.trained in ("center_scales", "routers"):
        centers = {name.removeprefix("centers."): t for name, t in weights.items() if name.startswith("centers.")}
        fixed = model.centers if settings.trained == "routers" else model.fixed_centers()
        _copy(fixed, centers, f"model.start_from {run}, its centers")
    model.restart_key_encoder()


def _copy(
    module: nn.Module, weights: dict[str, Tensor], where: str, may_be_missing: Collection[str] = frozenset()
) -> None:
    wanted = module.state_dict()
    missing = [name for name in wanted.keys() - weights.keys() if name not in may_be_missing]
    unknown = sorted(weights.keys() - wanted.keys())
    shapes = [
        f"{name} is {tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    problems = [
        *([f"{len(missing)} tensors are missing, {sorted(missing)[0]} among them"] if missing else []),
        *([f"{len(unknown)} have no place here, {unknown[0]} among them"] if unknown else []),
        *shapes[:1],
    ]
    if problems:
        raise RecipeError(f"{where} does not fit this network: {'; '.join(problems)}")
    module.load_state_dict({**wanted, **weights})


def _of_file(path: Path) -> dict[str, Tensor]:
    file = weights_file(path)
    tensors = state_dict_of(read_tensors(file, f"model.start_from {file}"))
    if not tensors:
        raise RecipeError(f"model.start_from {path} is not a state dict of tensors by name")
    return tensors

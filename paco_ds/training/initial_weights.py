"""Where training starts from: the run of a first stage, a file of weights, or published ones; and what stays frozen."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from paco_ds.checkpoint import open_run
from paco_ds.config.recipe import ModelSettings
from paco_ds.errors import RecipeError
from paco_ds.models.backbones import make_backbone
from paco_ds.models.families import USUAL_SIZES, ImageSizes
from paco_ds.models.recogniser import Recogniser
from paco_ds.training.fitting import Fit, fill_backbone, needs_whole
from paco_ds.training.pretrained import is_published, published_weights
from paco_ds.training.weight_files import is_hub_folder, read_tensors, state_dict_of, weights_file

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
    is_run = not is_published(start) and not is_hub_folder(path) and (path.is_dir() or not path.suffix)
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
    whole = backbone.network
    if needs_whole(backbone):
        whole = make_backbone(settings.model_copy(update={"experts": None}), sizes).network
    fit = fill_backbone(backbone, whole, tensors, settings.start_from_min_share, f"model.start_from {start}")
    model.restart_key_encoder()
    return fit


def require_same_network(first: ModelSettings, second: ModelSettings, run: str | Path) -> None:
    """Raise RecipeError, naming what differs, if a second stage cannot take over the weights of the first, in `run`."""
    differing = [
        f"{name} {getattr(first, name)!r} there, {getattr(second, name)!r} here"
        for name in (*_SAME, *(_SAME_CENTERS if second.trained == "routers" else ()))
        if getattr(first, name) != getattr(second, name)
    ]
    if differing:
        raise RecipeError(f"model.start_from {run} was trained with another network: {'; '.join(differing)}")


def freeze(model: Recogniser, settings: ModelSettings) -> None:
    """Leave gradients to what `model.trained` names, in place.

    Raises:
        RecipeError: `last_block` of a network without residual stages.
    """
    if settings.trained in ("centers", "center_scales", "routers"):
        model.freeze_encoder(settings.frozen_batch_norm)  # centers that are not trained have no gradient from the start
    elif settings.trained == "last_block":
        network = model.query_encoder.backbone.network
        stage = getattr(network, "layer4", None)
        if not isinstance(stage, nn.Sequential):
            raise RecipeError(f"model.trained last_block needs a ResNet or ResNeXt, not {settings.backbone}")
        last = set(stage[-1].parameters())
        norms = (m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        trained = last | {parameter for norm in norms for parameter in norm.parameters()}
        for parameter in network.parameters():
            parameter.requires_grad_(parameter in trained)


def _fill_from_run(model: Recogniser, settings: ModelSettings, run: Path) -> None:
    first, checkpoint = open_run(run, "model.start_from", "name the folder where it is")
    require_same_network(first.model, settings, run)
    weights = checkpoint.model()
    encoder = {
        name.removeprefix("query_encoder."): tensor
        for name, tensor in weights.items()
        if name.startswith(_BACKBONE) or (name.startswith("query_encoder.projection.") and model.has_projection)
    }
    _copy(model.query_encoder, encoder, f"model.start_from {run}", missing_ok="projection.")
    if settings.trained in ("center_scales", "routers"):
        centers = {name.removeprefix("centers."): t for name, t in weights.items() if name.startswith("centers.")}
        fixed = model.centers if settings.trained == "routers" else model.fixed_centers()
        _copy(fixed, centers, f"model.start_from {run}, its centers")
    model.restart_key_encoder()


def _copy(module: nn.Module, weights: dict[str, Tensor], where: str, missing_ok: str | None = None) -> None:
    wanted = module.state_dict()
    missing = [name for name in wanted.keys() - weights.keys() if not (missing_ok and name.startswith(missing_ok))]
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

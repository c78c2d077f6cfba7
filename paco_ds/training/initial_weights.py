"""Where training starts from: the run of a first stage, a file of weights, or torchvision's; and what stays frozen.

Nothing is unpickled but tensors: .pth files are read with torch's `weights_only`.
"""

from __future__ import annotations

import difflib
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor, nn

from paco_ds.checkpoint import open_run
from paco_ds.config.parse import one_line
from paco_ds.config.recipe import ModelSettings
from paco_ds.errors import RecipeError
from paco_ds.models.recogniser import Recogniser

TORCHVISION = "torchvision:"
_SAME = ("backbone", "width", "experts", "expert_width")  # what the first stage must share
_SAME_CENTERS = ("centers", "centers_scale")  # and where its centers are taken over as they are
_BACKBONE = "query_encoder.backbone."
_CLASSIFIERS = ("fc", "classifier", "heads", "head")  # what torchvision's networks call theirs
# What RIDE's files hold beside tensors: their settings and a score. Each is read as a placeholder; nothing is imported.
_PLACEHOLDERS = (
    "parse_config.ConfigParser",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "_codecs.encode",
)


class _Placeholder:
    """Takes the place of a foreign object in a file, and forgets what it is given."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def load_initial_weights(model: Recogniser, settings: ModelSettings) -> None:
    """Put what `model.start_from` names into the encoders of a fresh model, in place.

    Of a run: backbone and projection, and for `trained: center_scales` and `routers` its centers; of a file or of
    torchvision: the backbone.

    Raises:
        RecipeError: nothing there, or weights of another network, naming what differs.
    """
    start = settings.start_from
    if start is None:
        return
    is_run = not start.startswith(TORCHVISION) and (Path(start).is_dir() or not Path(start).suffix)
    if settings.trained in ("center_scales", "routers") and not is_run:
        raise RecipeError(
            f"model.trained {settings.trained} needs trained centers too, which {start} has not: let model.start_from "
            f"be the run directory of a first stage"
        )
    if start.startswith(TORCHVISION):
        _fill(model, _of_torchvision(settings, start.removeprefix(TORCHVISION)), start)
    elif is_run:
        _fill_from_run(model, settings, Path(start))
    else:
        _fill(model, _of_file(Path(start)), start)


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


def _fill(model: Recogniser, weights: dict[str, Tensor], where: str) -> None:
    """Backbone weights as torchvision names them, the classifier's left out."""
    network = model.query_encoder.backbone.network
    wanted = network.state_dict().keys()
    classifier = {name for name in weights.keys() - wanted if name.split(".")[0] in _CLASSIFIERS}
    _copy(network, {name: t for name, t in weights.items() if name not in classifier}, f"model.start_from {where}")
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
    weights = read_tensors(path, f"model.start_from {path}")
    if not isinstance(weights, dict) or not all(isinstance(t, Tensor) for t in weights.values()):
        raise RecipeError(f"model.start_from {path} is not a state dict of tensors by name")
    return weights


def read_tensors(path: Path, where: str) -> Any:
    """The content of a `.safetensors` file, or of one of `torch.save` with tensors alone: nothing in it is executed.

    Raises:
        RecipeError: it cannot be read; begins with ``where``.
    """
    if not path.is_file():
        raise RecipeError(f"{where}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([(_Placeholder, name) for name in _PLACEHOLDERS]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own text advises to read it unsafely
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {found[1]}" if found else "it is no file of torch.save, or damaged"
        raise RecipeError(
            f"{where} holds no weights that can be read safely: {what}; nothing in a file is executed: give one of "
            f"tensors alone, as torch.save(model.state_dict(), FILE) writes it"
        ) from error
    except Exception as error:  # a damaged file, or one that asks for code, raises nearly anything
        raise RecipeError(f"{where} holds no weights that can be read safely: {one_line(error)}") from error


def _of_torchvision(settings: ModelSettings, name: str) -> dict[str, Tensor]:
    import torchvision  # here: its import is 3 s of a core in every rank, and most runs need none of it

    try:
        known = [w.name for w in torchvision.models.get_model_weights(settings.backbone)]
    except ValueError:
        raise RecipeError(
            f"model.start_from {TORCHVISION}{name}: torchvision has no weights of {settings.backbone}; give a file of "
            f"weights, or one of its networks"
        ) from None
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise RecipeError(
            f"model.start_from {TORCHVISION}{name}: {settings.backbone} has {', '.join(known)}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    return _downloaded(torchvision.models.get_model_weights(settings.backbone)[name])


def _downloaded(weights: Any) -> dict[str, Tensor]:
    """The tensors of one of torchvision's weights, from torch's folder of downloads; one rank of a host fetches them.

    Raises:
        RecipeError: they are not there and cannot be fetched, with their URL and the place for a copy.
    """
    folder = Path(torch.hub.get_dir(), "checkpoints")
    file = folder / weights.url.rpartition("/")[2]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            tensors: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: of another digest
        raise RecipeError(
            f"cannot fetch {weights.url} ({one_line(error)}): where there is no network, put that file to {file}, or "
            "name it by model.start_from"
        ) from error
    return tensors

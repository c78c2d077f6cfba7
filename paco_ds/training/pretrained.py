"""Weights that torchvision and timm publish, by name: fetched once by a host, or found where a user has put them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from paco_ds.config.parse import one_line
from paco_ds.errors import RecipeError
from paco_ds.models.families.timm import weight_configs
from paco_ds.training.weight_files import read_tensors, state_dict_of

TORCHVISION, TIMM = "torchvision:", "timm:"


def is_published(start: str) -> bool:
    """Whether `model.start_from` is the name of published weights, not a path."""
    return start.startswith((TORCHVISION, TIMM))


def published_weights(start: str, backbone: str) -> Mapping[str, Tensor]:
    """The tensors of `torchvision:NAME` or `timm:TAG` of a backbone, as its library names them.

    Raises:
        RecipeError: no such weights, naming those there are; or they are not there and cannot be fetched, with their
            URL and the place for a copy.
    """
    if start.startswith(TORCHVISION):
        return _of_torchvision(start, backbone)
    return _of_timm(start, backbone)


def _of_torchvision(start: str, backbone: str) -> dict[str, Tensor]:
    import torchvision  # here: its import is 3 s of a core in every rank, and most runs need none of it

    name = start.removeprefix(TORCHVISION)
    try:
        known = [w.name for w in torchvision.models.get_model_weights(backbone)]
    except ValueError:
        raise RecipeError(
            f"model.start_from {start}: torchvision has no weights of {backbone}; give a file of weights, or one of "
            f"its networks"
        ) from None
    _check_known(start, name, known, backbone)
    weights = torchvision.models.get_model_weights(backbone)[name]
    file = _downloads() / weights.url.rpartition("/")[2]

    def fetch() -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True)
        return tensors

    return _fetched(file, weights.url, fetch)


def _of_timm(start: str, backbone: str) -> Mapping[str, Tensor]:
    """From a file that a user has put into torch's folder of downloads, or by the hub's own cache."""
    architecture, tag = backbone.removeprefix(TIMM), start.removeprefix(TIMM)
    if not backbone.startswith(TIMM):
        raise RecipeError(f"model.start_from {start}: timm has no weights of {backbone}; set model.backbone=timm:NAME")
    configs = weight_configs(architecture)
    known = [name.partition(".")[2] for name in configs]
    tag = tag.removeprefix(f"{architecture}.")
    _check_known(start, tag, known, backbone)
    config = configs[f"{architecture}.{tag}"] if tag else configs[architecture]
    name = f"{architecture}.{tag}".rstrip(".")
    if config.hf_hub_id:
        filename = config.hf_hub_filename or "model.safetensors"
        url = f"https://huggingface.co/{config.hf_hub_id}/resolve/main/{filename}"
    else:
        filename = url = config.url
    file = _downloads() / f"{name}{Path(filename).suffix}"
    if file.suffix == ".npz":
        raise RecipeError(f"model.start_from {start}: {url} is a file of JAX, which is not read; choose another tag")

    def fetch() -> Mapping[str, Tensor]:
        if not file.is_file():
            if not config.hf_hub_id:
                torch.hub.download_url_to_file(url, str(file), progress=False)
            else:
                from huggingface_hub import hf_hub_download

                path = hf_hub_download(config.hf_hub_id, filename)
                return state_dict_of(read_tensors(Path(path), f"model.start_from {start}"))
        return state_dict_of(read_tensors(file, f"model.start_from {start}"))

    return _fetched(file, url, fetch)


def _check_known(start: str, name: str, known: Iterable[str], backbone: str) -> None:
    names = list(known)
    if name in names:
        return
    near = difflib.get_close_matches(name, names, n=1)
    there = ", ".join(each or "one without a tag (timm:)" for each in names) or "none"
    raise RecipeError(
        f"model.start_from {start}: {backbone} has {there}" + (f"; did you mean {near[0]}?" if near else "")
    )


def _downloads() -> Path:
    return Path(torch.hub.get_dir(), "checkpoints")


def _fetched(file: Path, url: str, fetch: Callable[[], Any]) -> Any:
    """What `fetch` gives, one rank of a host after the other; RecipeError if it cannot be fetched."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            return fetch()
    except RecipeError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: of another digest
        raise RecipeError(
            f"cannot fetch {url} ({one_line(error)}): where there is no network, put that file to {file}, or "
            "name it by model.start_from"
        ) from error

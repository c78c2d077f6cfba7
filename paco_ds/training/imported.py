"""A run whose first checkpoint holds the weights and the queue of a published file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from paco_ds.checkpoint import Checkpoints
from paco_ds.checkpoint.read import step_folders
from paco_ds.config.load import load_recipe
from paco_ds.config.recipe import ModelSettings, QueueSettings
from paco_ds.data.manifest import open_data
from paco_ds.errors import RecipeError
from paco_ds.evaluation.results import versions
from paco_ds.files import replace_text, sha256_file, storage_errors
from paco_ds.models.recogniser import Recogniser
from paco_ds.training.build import Classes, build_model
from paco_ds.training.published import Published, read_published


def import_published(path: Path, config: str | Path, run: Path, overrides: Sequence[str] = ()) -> Published:
    """Write `recipe.yaml` and a checkpoint of step 0 into a run directory without checkpoints.

    Momentum buffers are zero, as at a start: the file's belong to another order of parameters.

    Raises:
        RecipeError: the file cannot be read, or does not fit the recipe, with the setting that differs; or the
            directory has checkpoints.
        DataError: the recipe's shards are not there.
    """
    if step_folders(run / "checkpoints"):
        raise RecipeError(f"{run} has checkpoints already: give another --output")
    recipe, published = load_recipe(config, overrides), read_published(path)
    manifest = open_data(recipe.data, [])
    split = recipe.data.train_split
    model = build_model(recipe, Classes.of(manifest, split))
    _fill(model, published, recipe.model, path)
    queue = None if recipe.keys_from is None else _queue(published, recipe.queue, recipe.model, path)
    with storage_errors(run):
        run.mkdir(parents=True, exist_ok=True)
    replace_text(run / "recipe.yaml", recipe.to_yaml())
    about = {
        "world_size": 1,
        "zero_stage": 0,
        "autocast": False,
        "scale": recipe.step.scale,
        "usual_norm": {},
        "epoch": 0.0,
        "versions": versions(),
        "teacher_sha256": None,
        "data": asdict(manifest.trained_data(split)),
        "imported": {"file": path.name, "sha256": sha256_file(path), "epoch": published.epoch},
    }
    momentum = [(name, torch.zeros_like(p)) for name, p in model.named_parameters() if p.requires_grad]
    weights = [(name, tensor) for name, tensor in model.state_dict().items()]
    Checkpoints(run, recipe, manifest.sha256).save(0, weights, momentum, queue, about)
    return published


def _fill(model: Recogniser, published: Published, settings: ModelSettings, path: Path) -> None:
    """Put all tensors into the model, in place; RecipeError, with the setting, if they are not exactly its own."""
    wanted = {name: t for name, t in model.state_dict().items() if not name.startswith("normalize.")}
    missing, surplus = sorted(wanted.keys() - published.model.keys()), sorted(published.model.keys() - wanted.keys())
    if missing or surplus:
        keys = _has_keys(wanted), _has_keys(published.model)
        raise RecipeError(f"{path} does not fit the recipe: {_difference(missing, surplus, *keys, settings)}")
    for name, tensor in published.model.items():
        if tensor.shape != wanted[name].shape:
            what = f"{name} is {tuple(tensor.shape)} there, {tuple(wanted[name].shape)} by the recipe"
            if name.startswith("centers."):
                raise RecipeError(f"{path} has {len(tensor)} classes, the shards {len(wanted[name])} ({what})")
            raise RecipeError(f"{path} does not fit the recipe: {what}; see model.backbone and model.projection_dim")
    model.load_state_dict({**model.state_dict(), **published.model})


def _has_keys(names: Iterable[str]) -> bool:
    return any(name.startswith("key_encoder.") for name in names)


def _difference(missing: list[str], surplus: list[str], wanted: bool, there: bool, settings: ModelSettings) -> str:
    """What to set, in words."""

    def count(names: list[str], what: str) -> str:
        return f"{len(names)} tensors {what}, {names[0]} among them" if names else ""

    said = " and ".join(filter(None, (count(missing, "are missing there"), count(surplus, "have no place here"))))
    if wanted and not there:
        return f"{said}; the file has no key encoder, as GPaCo's: set key_encoder=null"
    if there and not wanted:
        return f"{said}; the file has a key encoder, as PaCo's: the recipe needs one"
    if any(".projection." in name for name in missing + surplus):
        return f"{said}; model.projection is {settings.projection}: PaCo's is two_layer, GPaCo's three_layer"
    return f"{said}; model.backbone is {settings.backbone}"


def _queue(published: Published, queue: QueueSettings, model: ModelSettings, path: Path) -> dict[str, Tensor]:
    """The queue for a recipe that has one; RecipeError if its length or its keys differ."""
    if published.queue is None:
        raise RecipeError(f"{path} has no queue of keys, and the recipe's method has one")
    length, dim = published.queue["keys"].shape
    if length != queue.length:
        raise RecipeError(f"{path} has a queue of {length} keys: set queue.length={length}, not {queue.length}")
    if dim != model.projection_dim:
        raise RecipeError(f"{path} has keys of {dim} dimensions: set model.projection_dim={dim}")
    return published.queue

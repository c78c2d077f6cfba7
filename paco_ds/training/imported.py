"""A run whose first checkpoint holds the weights, and of PaCo the queue, of a published file."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from paco_ds.checkpoint import Checkpoints
from paco_ds.checkpoint.read import step_folders
from paco_ds.config.load import load_recipe
from paco_ds.config.model import ModelSettings
from paco_ds.config.recipe import QueueSettings
from paco_ds.contrast.key_queue import KeyQueue
from paco_ds.data.manifest import open_data
from paco_ds.distributed.zero import plain_states
from paco_ds.errors import RecipeError
from paco_ds.evaluation.results import versions
from paco_ds.files import replace_text, sha256_file, storage_errors
from paco_ds.models.recogniser import Recogniser
from paco_ds.models.weight_names import AVERAGE
from paco_ds.training.build import Classes, build_model
from paco_ds.training.identify_network import backbone_of
from paco_ds.training.optimizer import make_optimizer
from paco_ds.training.published import NETWORK, Published, read_published
from paco_ds.training.weight_files import weights_file


@dataclass(frozen=True)
class Imported:
    """What became of a file.

    Attributes:
        published: the file.
        backbone: `model.backbone` of the run.
        taken: tensors taken over, those of the key encoder of a file without one not counted.
        unused: names in the file that the run has no place for.
        fresh: parts of the run that the file has not, drawn from the recipe's seed.
    """

    published: Published
    backbone: str
    taken: int
    unused: list[str]
    fresh: list[str]


def import_published(
    path: Path, config: str | Path, run: Path, overrides: Sequence[str] = (), *, new_classifier: bool = False
) -> Imported:
    """Write `recipe.yaml` and a checkpoint of step 0 into a run directory without checkpoints.

    The optimizer's states are zero, as at a start: the file's belong to another order of parameters.

    Args:
        new_classifier: leave out the file's classifier, and the keys of its classes; that of the run is drawn.

    Raises:
        RecipeError: the file cannot be read, or does not fit the recipe, with the setting that differs; or the
            directory has checkpoints.
        DataError: the recipe's shards are not there.
    """
    if step_folders(run / "checkpoints"):
        raise RecipeError(f"{run} has checkpoints already: give another --output")
    load_recipe(config, overrides)  # mistakes in settings are reported before a large file is read
    published = read_published(path)
    recipe = load_recipe(config, (*overrides, *backbone_of(published, overrides)))
    manifest = open_data(recipe.data, [])
    split = recipe.data.train_split
    model = build_model(recipe, Classes.of(manifest, split))
    imported = _fill(model, published, recipe.model, path, new_classifier)
    queue = None
    if recipe.keys_from is not None:
        if published.kind == "paco" and not new_classifier:
            queue = _queue(published, recipe.queue, recipe.model, path)
        else:
            queue = KeyQueue(recipe.queue.length, recipe.model.key_dim).state_dict()
    about = {
        "world_size": 1,
        "zero_stage": 0,
        "autocast": False,
        "scale": recipe.step.scale,
        "usual_norm": {},
        "epoch": 0.0,
        "versions": versions(),
        "teacher_sha256": None,
        "data": manifest.trained_data(split).state(),
        "imported": {
            "file": path.name,
            "sha256": sha256_file(weights_file(path)),
            "epoch": published.epoch,
            "fresh": imported.fresh,
        },
    }
    states = plain_states(make_optimizer(model, recipe.optimizer, recipe.lr, whole=True), model)
    weights = [(name, tensor) for name, tensor in model.state_dict().items()]
    with _whole_run(run):
        replace_text(run / "recipe.yaml", recipe.to_yaml())
        Checkpoints(run, recipe, manifest.sha256).save(0, weights, states, queue, about)
    return imported


@contextmanager
def _whole_run(run: Path) -> Iterator[None]:
    """A new run directory, which is removed if the block fails; one that was there stays."""
    new = not run.exists()
    try:
        with storage_errors(run):
            run.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        if new:
            shutil.rmtree(run, ignore_errors=True)
        raise


def _fill(
    model: Recogniser, published: Published, settings: ModelSettings, path: Path, new_classifier: bool
) -> Imported:
    """Put the tensors into the model, in place; RecipeError, with the setting, if they do not fit.

    PaCo's files have all parts. Of the others a projection, prototypes and routers may be missing; their key encoder
    starts from the query encoder.
    """
    aside = ("normalize.", AVERAGE)
    wanted = {name: t for name, t in model.state_dict().items() if not name.startswith(aside)}
    there, unused = dict(published.model), list(published.unused)
    if published.kind == "network":
        there = _with_centers(there, wanted)
    if model.routers is None:
        unused += [name for name in there if name.startswith("routers.")]
    if new_classifier:
        unused += [name for name in there if name.startswith("centers.")]
    there = {name: tensor for name, tensor in there.items() if name not in unused}
    if any(name.startswith("centers.") for name in there):
        _check_centers(there, wanted, settings, path)
    elif not new_classifier:
        raise RecipeError(
            f"{path} has no classifier{', as those of MoCo' if published.kind == 'moco' else ''}: with "
            "--new-classifier it becomes a run whose classifier is drawn, and which training goes on from"
        )
    may_miss: tuple[str, ...] = ("centers.",) if new_classifier else ()
    if published.kind != "paco":
        may_miss += ("query_encoder.projection.", "key_encoder.", "prototypes.", "routers.")
    absent = wanted.keys() - there.keys()
    missing = sorted(name for name in absent if not name.startswith(may_miss))
    surplus = sorted(there.keys() - wanted.keys())
    if missing or surplus:
        if published.kind == "paco":
            said = _difference(missing, surplus, _has_keys(wanted), _has_keys(there), settings)
        else:
            said = f"{_counted(missing, surplus)}; {_remedy(published, settings)}"
        raise RecipeError(f"{path} does not fit the recipe: {said}")
    for name, tensor in there.items():
        if tensor.shape != wanted[name].shape:
            what = f"{name} is {tuple(tensor.shape)} there, {tuple(wanted[name].shape)} by the recipe"
            if name.startswith("routers.decide"):
                top = tensor.shape[1] - settings.routers.hidden
                raise RecipeError(f"{path} has routers that see {top} logits: set model.routers.top_logits={top}")
            raise RecipeError(
                f"{path} does not fit the recipe: {what}; see model.backbone, model.expert_width and "
                "model.projection_dim"
            )
    model.load_state_dict({**model.state_dict(), **there})
    if any(name.startswith("key_encoder.") for name in absent):
        model.restart_key_encoder()
    if model.average is not None:
        model.begin_average()
    parts = {"centers": "classifier", "prototypes": "projection of the centers", "routers": "routers"}
    fresh = [what for part, what in parts.items() if any(name.startswith(f"{part}.") for name in absent)]
    if any(name.startswith("query_encoder.projection.") for name in absent):
        fresh.append("projection")
    return Imported(published, settings.backbone, len(there), sorted(unused), fresh)


def _check_centers(
    there: Mapping[str, Tensor], wanted: Mapping[str, Tensor], settings: ModelSettings, path: Path
) -> None:
    """RecipeError if the classifiers are of another kind, number or count of classes."""
    experts = len({name.split(".")[1] for name in there if re.match(r"centers\.\d+\.", name)}) or None
    if experts != settings.experts:
        raise RecipeError(f"{path} has {experts or 'no'} experts: set model.experts={experts or 'null'}")
    linear = any(name.startswith("centers.") and name.endswith("bias") for name in there)
    if linear != any(name.startswith("centers.") and name.endswith("bias") for name in wanted):
        raise RecipeError(f"{path} has {'linear' if linear else 'cosine'} centers: set model.centers to that")
    for name, tensor in there.items():
        if name.startswith("centers.") and name in wanted and len(tensor) != len(wanted[name]):
            raise RecipeError(
                f"{path} has {len(tensor)} classes, the shards {len(wanted[name])}: give --set data.shards=, or "
                "--new-classifier to train one for these"
            )


def _with_centers(there: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's tensors, the one linear layer that ours has not as the centers; a missing bias is zero."""
    surplus = {name for name in there if name not in wanted}
    layers = {name.rpartition(".")[0] for name in surplus}
    if len(layers) != 1 or surplus - {f"{next(iter(layers))}.{end}" for end in ("weight", "bias")}:
        return dict(there)
    layer = layers.pop()
    weight = there.get(f"{layer}.weight")
    if weight is None or weight.ndim != 2:
        return dict(there)
    rest = {name: tensor for name, tensor in there.items() if name in wanted}
    bias = there.get(f"{layer}.bias", torch.zeros(len(weight)))
    return {**rest, "centers.weight": weight, "centers.bias": bias}


def _counted(missing: list[str], surplus: list[str]) -> str:
    """How many tensors do not fit, in words."""

    def count(names: list[str], what: str) -> str:
        return f"{len(names)} tensors {what}, {names[0].removeprefix(NETWORK)} among them" if names else ""

    return " and ".join(filter(None, (count(missing, "are missing there"), count(surplus, "have no place here"))))


def _remedy(published: Published, settings: ModelSettings) -> str:
    if published.kind == "ride":
        return f"model.backbone is {settings.backbone} with model.experts {settings.experts}"
    return f"model.backbone is {settings.backbone}: set the name of this network, as resnet50 or timm:resnet50"


def _has_keys(names: Iterable[str]) -> bool:
    return any(name.startswith("key_encoder.") for name in names)


def _difference(missing: list[str], surplus: list[str], wanted: bool, there: bool, settings: ModelSettings) -> str:
    """What to set, in words."""
    said = _counted(missing, surplus)
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

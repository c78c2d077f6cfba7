"""Read checkpoints: verify them, and find the newest or best of a run."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from paco_ds.checkpoint.tensors import load_tensors
from paco_ds.config.load import load_recipe
from paco_ds.config.recipe import Recipe
from paco_ds.errors import CheckpointError, RecipeError, StorageError
from paco_ds.files import sha256_file
from paco_ds.models.recogniser import Recogniser
from paco_ds.models.weight_names import AVERAGE, KEY_ENCODER, average_of

logger = logging.getLogger(__name__)

FORMAT = "paco_ds checkpoint"
# 1, of 0.8 and 0.9, has no STATE_DIGEST; until 2 the optimizer was SGD, in MOMENTUM; until 3 MODEL held frozen weights
VERSIONS = (1, 2, 3, 4)
BEST = "best"  # folder of the best weights on the validation split
MODEL, OPTIMIZER, QUEUE, STATE = "model.safetensors", "optimizer.safetensors", "queue.safetensors", "state.json"
MOMENTUM = "momentum.safetensors"
STATE_DIGEST = "state_sha256"  # entry of state.json: of all its other entries
OLD = ".old"  # ending of what is being replaced


class Frozen(BaseModel):
    """The file of the weights that are not trained, beside the checkpoints of a run that all name it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    file: str = Field(pattern=r"^frozen-[0-9a-f]{16}\.safetensors$")
    sha256: str


class _State(BaseModel):
    """What state.json has to hold; further entries are allowed."""

    model_config = ConfigDict(strict=True, extra="allow")

    step: int = Field(ge=0)
    meaning: dict[str, Any]
    manifest_sha256: str
    sha256: dict[
        Literal["model.safetensors", "optimizer.safetensors", "momentum.safetensors", "queue.safetensors"], str
    ]
    frozen: Frozen | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A complete, verified checkpoint on disk. `step` is the number of optimizer steps done."""

    path: Path
    step: int
    state: Mapping[str, Any]

    def model(self) -> dict[str, Tensor]:
        """Weights and buffers by name, float32 (counters int64); frozen ones too, and what in averages is equal to
        them."""
        weights = load_tensors(self.path / MODEL)
        if self.state.get("frozen") is None:
            return weights
        frozen = load_tensors(self.path.parent / self.state["frozen"]["file"])
        for average in (KEY_ENCODER, AVERAGE):
            if any(name.startswith(average) for name in weights):
                names = {source: average_of(source, average) for source in frozen}
                weights |= {name: frozen[source] for source, name in names.items() if name is not None}
        return frozen | weights

    def load_into(self, model: Recogniser) -> None:
        """Set all weights and buffers of a model, in place; an average that it has no place for is left out.

        Raises:
            CheckpointError: the model has an average, and the checkpoint none; or it is another network.
        """
        weights, averages = self.model(), model.average is not None
        saved = any(name.startswith(AVERAGE) for name in weights)
        if averages and not saved:
            raise CheckpointError(
                f"evaluation.weights ema: {self.path} has no average, which is kept from the first step on where "
                "that is set; set it to query or key, or train again with another --output"
            )
        taken = {name: tensor for name, tensor in weights.items() if averages or not name.startswith(AVERAGE)}
        there, here = _shapes(taken), _shapes(model.state_dict())
        if differs := sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name)):
            name = differs[0]
            raise CheckpointError(
                f"{self.path} is of another network, {len(differs)} tensors differ: {name} is "
                f"{there.get(name, 'missing')} there and {here.get(name, 'missing')} here. The sections model and loss "
                f"must be those that it was trained with"
            )
        model.load_state_dict(taken)

    def optimizer(self) -> dict[str, Tensor]:
        """The optimizer's states, float32, by STATE.PARAMETER: momentum_buffer of SGD, of LARS and of Muon's matrices,
        exp_avg and exp_avg_sq of AdamW, which also steps what is no matrix of Muon; and `step`, how many steps AdamW
        has applied."""
        if MOMENTUM in self.state["sha256"]:
            return states_of_momentum(load_tensors(self.path / MOMENTUM))
        return load_tensors(self.path / OPTIMIZER)

    def queue(self) -> dict[str, Tensor]:
        """The state of a `KeyQueue`; only for methods with a queue."""
        return load_tensors(self.path / QUEUE)

    def check_data(self, manifest_sha256: str, remedy: str = "or give another --output") -> None:
        """Check that the shards are those it was trained on.

        Args:
            remedy: what else to do than to point data.shards at those, for the message.

        Raises:
            CheckpointError: the manifest is another.
        """
        trained_on = self.state["manifest_sha256"]
        if trained_on != manifest_sha256:
            raise CheckpointError(
                f"{self.path} was trained on other shards (manifest {trained_on[:12]}, now {manifest_sha256[:12]}): "
                f"point data.shards at those, {remedy}"
            )


def states_of_momentum(momentum: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimizer's states as `Checkpoint.optimizer` names them, of a file of momentum by parameter, until 0.13."""
    return {f"momentum_buffer.{name}": tensor for name, tensor in momentum.items()}


def read_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint and verify all its files.

    Raises:
        CheckpointError: a file is missing or damaged, or the format has another version.
    """
    state = _read_state(path)
    for file, sha256 in state["sha256"].items():
        try:
            found = sha256_file(path / file)
        except OSError as error:
            reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
            raise CheckpointError(f"checkpoint {path} is half-written or damaged: {file} {reason}") from None
        if found != sha256:
            raise CheckpointError(f"checkpoint {path} is damaged: SHA-256 of {file} differs from {STATE}")
    _check_frozen(path, state.get("frozen"))
    return Checkpoint(path, state["step"], state)


def _check_frozen(path: Path, frozen: Mapping[str, str] | None) -> None:
    if frozen is None:
        return
    file = path.parent / frozen["file"]
    try:
        found = sha256_file(file)
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise CheckpointError(
            f"checkpoint {path} needs the frozen weights of its run, and {file} {reason}: copy it there, from beside "
            "the run's other checkpoints"
        ) from None
    if found != frozen["sha256"]:
        raise CheckpointError(
            f"checkpoint {path} needs the frozen weights of its run, and {file} holds others or is damaged (SHA-256 "
            f"{found[:12]}, not {frozen['sha256'][:12]}): copy it there again"
        )


def _read_state(path: Path) -> dict[str, Any]:
    """The verified entries of state.json."""
    damaged = f"checkpoint {path} is half-written or damaged: {STATE}:"
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        digest = state_digest(state) if isinstance(state, dict) else None
    except RecursionError:
        raise CheckpointError(f"{damaged} it is nested too deep") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{damaged} {error}") from None
    if digest is None or state.get("format") != FORMAT or state.get("version") not in VERSIONS:
        raise CheckpointError(f"{path / STATE} is not a '{FORMAT}' of version 1 to 4, those that this paco_ds reads")
    if (STATE_DIGEST in state or state["version"] != 1) and state.get(STATE_DIGEST) != digest:
        raise CheckpointError(f"checkpoint {path} is damaged: SHA-256 of the entries of {STATE} differs")
    try:
        _State.model_validate(state)
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{damaged} {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if MODEL not in state["sha256"]:
        raise CheckpointError(f"{damaged} it has no digest of {MODEL}")
    named = _step_of(path.name)
    if named is not None and named != state["step"]:
        raise CheckpointError(f"{damaged} it is of step {state['step']}, its folder's name of step {named}")
    return state


def state_digest(state: Mapping[str, Any]) -> str:
    """SHA-256 of all entries of a state.json, as it is read, but STATE_DIGEST."""
    others = {key: value for key, value in state.items() if key != STATE_DIGEST}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def _step_of(name: str) -> int | None:
    """The step of a folder named exactly step-NNNNNNNN; None for other names."""
    found = re.fullmatch(r"step-([0-9]{8,})", name)
    return int(found[1]) if found and name == f"step-{int(found[1]):08d}" else None


def step_folders(folder: Path) -> dict[int, Path]:
    """The checkpoints in a folder by step, unread. Files, dangling links and folders of other names are none."""
    with suppress(FileNotFoundError, NotADirectoryError):
        named = ((_step_of(path.name), path) for path in folder.iterdir())
        return {step: path for step, path in named if step is not None and path.is_dir()}
    return {}


def read_best(folder: Path, criterion: str) -> Checkpoint | None:
    """The best weights by a criterion, or None; those that were being replaced when the run was killed count."""
    path, old = folder / BEST, folder / f".{BEST}{OLD}"
    if not path.is_dir():
        path = old
    if not path.is_dir():
        return None
    best = read_checkpoint(path)
    return best if best.state.get("criterion") == criterion else None


def newest_checkpoint(run: Path) -> Checkpoint:
    """The newest intact checkpoint of a run directory, for any recipe; damaged ones are skipped with a warning.

    Raises:
        CheckpointError: there is none.
    """
    problems = []
    for _, path in sorted(step_folders(run / "checkpoints").items(), reverse=True):
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            problems.append(str(error))
            logger.warning("%s; trying the previous one", error)
    if problems:
        raise CheckpointError(
            "all checkpoints of this run are damaged:\n  "
            + "\n  ".join(problems)
            + f"\nRestore one, or move {run / 'checkpoints'} away to start again"
        )
    raise CheckpointError(f"no checkpoint under {run / 'checkpoints'}: train with --output {run} first")


def chosen_checkpoint(run: Path, criterion: str) -> Checkpoint:
    """The weights to evaluate of a run: the newest, or the best by `evaluation.checkpoint` if they are there.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    best = None if criterion == "last" else read_best(run / "checkpoints", criterion)
    return best or newest_checkpoint(run)


def open_run(run: Path, setting: str, remedy: str) -> tuple[Recipe, Checkpoint]:
    """The recipe of a trained run that a setting names, and the weights that stand for it.

    Args:
        setting: its dotted key, for the message.
        remedy: what else to do than to train it, for the message.

    Raises:
        RecipeError: there is no such run.
    """
    try:
        recipe = load_recipe(run / "recipe.yaml")
        return recipe, chosen_checkpoint(run, recipe.evaluation.checkpoint)
    except (RecipeError, CheckpointError) as error:
        raise RecipeError(
            f"{setting} {run} is no trained run ({error}): train it with --output {run}, or {remedy}"
        ) from error


def resume_hint(run: Path) -> str:
    """How to resume an interrupted run, by the names in its folder; nothing is read or verified."""
    steps = step_folders(run / "checkpoints")
    if not steps:
        return "There is no checkpoint yet: the same command starts again"
    return f"Run the same command again to resume from step {max(steps)}"


@contextmanager
def hint_after_storage_errors(run: Path) -> Iterator[None]:
    """Say after an error of storage how the run resumes."""
    try:
        yield
    except StorageError as error:
        raise StorageError(f"{error}. {resume_hint(run)}") from error


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}

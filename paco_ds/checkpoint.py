"""Checkpoints: everything that makes a resumed run the same run, at any ZeRO stage and on any legal number of ranks.

A checkpoint is a folder of safetensors (float32 weights and buffers; momentum; queue) and state.json (step, recipe,
manifest, digests of the files). It is written under a temporary name, read back, and renamed when whole. A damaged
one is found by its digests, and the one before it is used.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from paco_ds.config.load import load_recipe
from paco_ds.config.recipe import Recipe
from paco_ds.errors import CheckpointError, RecipeError
from paco_ds.files import sha256_file

logger = logging.getLogger(__name__)

FORMAT = "paco_ds checkpoint"
VERSION = 1
BEST = "best"  # folder of the weights that were best on the validation split
MODEL, MOMENTUM, QUEUE, STATE = "model.safetensors", "momentum.safetensors", "queue.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A whole, verified checkpoint on disk. `step` is the number of optimizer steps done."""

    path: Path
    step: int
    state: Mapping[str, Any]

    def model(self) -> dict[str, Tensor]:
        """Weights and buffers by name, float32 (counters int64)."""
        return load_file(self.path / MODEL)

    def momentum(self) -> dict[str, Tensor]:
        """Momentum buffers by the name of their parameter, float32."""
        return load_file(self.path / MOMENTUM)

    def queue(self) -> dict[str, Tensor]:
        """The state of a `KeyQueue`; only of methods that have one."""
        return load_file(self.path / QUEUE)

    def check_data(self, manifest_sha256: str) -> None:
        """Refuse shards other than those it was trained on.

        Raises:
            CheckpointError: the manifest is another one.
        """
        trained_on = self.state["manifest_sha256"]
        if trained_on != manifest_sha256:
            raise CheckpointError(
                f"{self.path} was trained on other shards (manifest {trained_on[:12]}, now {manifest_sha256[:12]}): "
                f"point data.shards at those, or give another --output"
            )


class Checkpoints:
    """The checkpoints of a run directory.

    Args:
        run: the run directory; checkpoints lie under checkpoints/.
        recipe, manifest_sha256: what a resumed run must agree on.
    """

    def __init__(self, run: Path, recipe: Recipe, manifest_sha256: str) -> None:
        self.folder = run / "checkpoints"
        self.recipe, self.manifest_sha256 = recipe, manifest_sha256

    def save(
        self,
        step: int,
        model: Iterable[tuple[str, Tensor]],
        momentum: Iterable[tuple[str, Tensor]],
        queue: Mapping[str, Tensor] | None,
        about: Mapping[str, Any],
        write: bool = True,
    ) -> None:
        """Write the checkpoint after `step` steps.

        Args:
            model, momentum: (name, tensor) of all weights and buffers, and of all momentum buffers. Every rank
                walks through them, since making them is a collective; only one with `write` keeps and writes them.
            about: further facts for state.json (world size, versions).
        """
        files = {MODEL: _kept(model, write), MOMENTUM: _kept(momentum, write)}
        if queue is not None:
            files[QUEUE] = _kept(queue.items(), write)
        if not write:
            return
        self._write(f"step-{step:08d}", files, self._state(step) | dict(about))
        self._prune(step)

    def _state(self, step: int) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "meaning": self.recipe.resume_identity(),
            "manifest_sha256": self.manifest_sha256,
        }

    def save_best(
        self, step: int, model: Iterable[tuple[str, Tensor]], about: Mapping[str, Any], write: bool = True
    ) -> None:
        """Keep the weights after `step` steps as the best so far, in place of the ones before; as `save`, without
        momentum and queue, since nothing goes on from them."""
        files = {MODEL: _kept(model, write)}
        if write:
            self._write(BEST, files, self._state(step) | {"criterion": self.recipe.evaluation.checkpoint} | dict(about))

    def best(self, until: int) -> Checkpoint | None:
        """The best weights of this run among its first `until` steps by the recipe's criterion, or None. Those of a
        later step belong to a part of the run that a resumed one takes again; those of another criterion, which may
        change between a run and its continuation, are the best of something else.

        Raises:
            CheckpointError: damaged, or of other meaning or other data.
        """
        if not (self.folder / BEST).exists():
            return None
        checkpoint = read_checkpoint(self.folder / BEST)
        if checkpoint.step > until or checkpoint.state["criterion"] != self.recipe.evaluation.checkpoint:
            return None
        self._check_resume_identity(checkpoint)
        return checkpoint

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint of this run, or None if there is none.

        Raises:
            CheckpointError: it is of other meaning or other data, or none of those there is whole.
        """
        if not any(self.folder.glob("step-*")):
            return None
        checkpoint = newest_checkpoint(self.folder.parent)
        self._check_resume_identity(checkpoint)
        return checkpoint

    def _check_resume_identity(self, checkpoint: Checkpoint) -> None:
        now = json.loads(json.dumps(self.recipe.resume_identity()))
        saved = checkpoint.state["meaning"]
        # a setting younger than the checkpoint then was what it is by default; one of a section that was left out, of
        # which the name alone is saved, was nothing
        younger = {key: self.recipe.default(key) for key in now.keys() - saved.keys() if not _left_out(key, saved)}
        saved = younger | saved
        differences = [
            f"  {key}: {saved.get(key)!r} in the checkpoint, {now.get(key)!r} in this recipe"
            for key in sorted(saved.keys() | now.keys())
            if saved.get(key) != now.get(key)
        ]
        if differences:
            raise CheckpointError(
                f"{checkpoint.path} was trained by another recipe:\n"
                + "\n".join(differences)
                + "\nSet these back to go on, or give another --output to start a new run"
            )
        checkpoint.check_data(self.manifest_sha256)

    def _write(self, name: str, files: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f".{name}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for file, tensors in files.items():
            save_file(dict(tensors), part / file)
        state["sha256"] = {file: sha256_file(part / file) for file in files}
        (part / STATE).write_text(json.dumps(state, indent=1))
        for path in (*part.iterdir(), part):
            _fsync(path)
        read_checkpoint(part)
        final = self.folder / name
        shutil.rmtree(final, ignore_errors=True)  # of an earlier, damaged or cut, attempt at this step
        part.rename(final)
        _fsync(self.folder)

    def _prune(self, newest: int) -> None:
        """Keep the newest by number. Later ones are damaged, else the run would have gone on from there."""
        for path in self.folder.glob("step-*"):
            if int(path.name.removeprefix("step-")) > newest:
                shutil.rmtree(path)
        for path in sorted(self.folder.glob("step-*"))[: -self.recipe.checkpoint.keep]:
            shutil.rmtree(path)
        for path in self.folder.glob(".step-*.part"):  # of a save that was killed
            shutil.rmtree(path)


def read_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint and verify every file of it.

    Raises:
        CheckpointError: a file is missing or damaged, or the format is another version's.
    """
    try:
        state = json.loads((path / STATE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is half-written or damaged: {STATE}: {error}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT or state.get("version") != VERSION:
        raise CheckpointError(f"{path / STATE} is not a '{FORMAT}' of version {VERSION}, the one this paco_ds reads")
    for file, sha256 in state["sha256"].items():
        if not (path / file).exists():
            raise CheckpointError(f"checkpoint {path} is half-written or damaged: {file} is missing")
        if sha256_file(path / file) != sha256:
            raise CheckpointError(f"checkpoint {path} is damaged: SHA-256 of {file} differs from {STATE}")
    return Checkpoint(path, state["step"], state)


def newest_checkpoint(run: Path) -> Checkpoint:
    """The newest whole checkpoint of a run directory, whatever its recipe; a damaged one is named and passed over.

    Raises:
        CheckpointError: there is none.
    """
    problems = []
    for path in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            problems.append(str(error))
            logger.warning("%s; trying the one before", error)
    if problems:
        raise CheckpointError(
            "no checkpoint of this run is whole:\n  "
            + "\n  ".join(problems)
            + f"\nRestore one, or move {run / 'checkpoints'} away to start again"
        )
    raise CheckpointError(f"no checkpoint under {run / 'checkpoints'}: train with --output {run} first")


def chosen_checkpoint(run: Path, recipe: Recipe) -> Checkpoint:
    """The weights that stand for a run: the newest, or the best if its recipe says so and they are there.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = run / "checkpoints" / BEST
    if recipe.evaluation.checkpoint != "last" and path.exists():
        best = read_checkpoint(path)
        if best.state["criterion"] == recipe.evaluation.checkpoint:
            return best
    return newest_checkpoint(run)


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
        return recipe, chosen_checkpoint(run, recipe)
    except (RecipeError, CheckpointError) as error:
        raise RecipeError(
            f"{setting} {run} is no trained run ({error}): train it with --output {run}, or {remedy}"
        ) from error


def resume_hint(run: Path) -> str:
    """What to do when a run was cut off; a glance at its folder, which reads and verifies nothing."""
    steps = sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))
    if not steps:
        return "There is no checkpoint yet: the same command starts again"
    return f"Run the same command again to go on from step {steps[-1]}"


def _left_out(key: str, meaning: Mapping[str, Any]) -> bool:
    """Whether a section around the setting `key` was null."""
    parts = key.split(".")
    return any(".".join(parts[:n]) in meaning for n in range(1, len(parts)))


def _kept(named: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """Walk through a collective to its end, keeping its tensors only where they are wanted."""
    kept = {}
    for name, tensor in named:
        if keep:
            kept[name] = tensor.detach().cpu().contiguous()
    return kept


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

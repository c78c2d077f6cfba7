"""Checkpoints: the state from which a run resumes exactly, at any ZeRO stage and legal number of ranks.

A checkpoint is a folder of safetensors (float32 weights and buffers; momentum; queue) and state.json (step, recipe,
manifest, digests of the files). It is written under a temporary name, read back, and renamed. A damaged checkpoint
is detected by its digests, and the previous one is used.
"""

from __future__ import annotations

import json
import logging
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
from paco_ds.files import fsync, sha256_file

logger = logging.getLogger(__name__)

FORMAT = "paco_ds checkpoint"
VERSION = 1
BEST = "best"  # folder of the best weights on the validation split
MODEL, MOMENTUM, QUEUE, STATE = "model.safetensors", "momentum.safetensors", "queue.safetensors", "state.json"

LOWERED = ("optimizer.lr", "optimizer.clip_norm")
"""Settings that a resumed run may have lower, as the remedy for steps that are skipped."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete, verified checkpoint on disk. `step` is the number of optimizer steps done."""

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
        """The state of a `KeyQueue`; only for methods with a queue."""
        return load_file(self.path / QUEUE)

    def check_data(self, manifest_sha256: str) -> None:
        """Check that the shards are those it was trained on.

        Raises:
            CheckpointError: the manifest is another.
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
        run: the run directory; checkpoints are in its folder checkpoints/.
        recipe, manifest_sha256: must be the same in a resumed run.
    """

    def __init__(self, run: Path, recipe: Recipe, manifest_sha256: str) -> None:
        self.folder = run / "checkpoints"
        self.recipe, self.manifest_sha256 = recipe, manifest_sha256
        self.lowered: dict[str, tuple[Any, Any]] = {}  # by setting: (in the checkpoint, now)

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
                must iterate over them, since that is a collective; only a rank with `write` writes them.
            about: further entries of state.json (world size, versions).
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
        """Write the weights after `step` steps as the best so far, replacing the previous best. As `save`, without
        momentum and queue, since no run resumes from them."""
        files = {MODEL: _kept(model, write)}
        if write:
            self._write(BEST, files, self._state(step) | {"criterion": self.recipe.evaluation.checkpoint} | dict(about))

    def best(self, until: int) -> Checkpoint | None:
        """The best weights among the first `until` steps by the recipe's criterion, or None. Weights of a later step
        belong to steps that the resumed run repeats. The criterion may change on resume: weights of another one are
        ignored.

        Raises:
            CheckpointError: damaged, or of another recipe or other data.
        """
        if not (self.folder / BEST).exists():
            return None
        checkpoint = read_checkpoint(self.folder / BEST)
        if checkpoint.step > until or checkpoint.state["criterion"] != self.recipe.evaluation.checkpoint:
            return None
        self._check_resume_identity(checkpoint)
        return checkpoint

    def latest(self) -> Checkpoint | None:
        """The newest intact checkpoint of this run, or None without checkpoints.

        Raises:
            CheckpointError: it is of another recipe or other data, or all checkpoints are damaged.
        """
        if not any(self.folder.glob("step-*")):
            return None
        checkpoint = newest_checkpoint(self.folder.parent)
        self._check_resume_identity(checkpoint)
        return checkpoint

    def _check_resume_identity(self, checkpoint: Checkpoint) -> None:
        now = json.loads(json.dumps(self.recipe.resume_identity()))
        saved = checkpoint.state["meaning"]
        # a setting newer than the checkpoint had its default value, except in a section that was null
        younger = {key: self.recipe.default(key) for key in now.keys() - saved.keys() if not _left_out(key, saved)}
        saved = younger | saved
        self.lowered = {key: (saved[key], now[key]) for key in LOWERED if _is_lower(now[key], saved[key])}
        saved = {**saved, **{key: now[key] for key in self.lowered}}
        differences = [
            f"  {key}: {saved.get(key)!r} in the checkpoint, {now.get(key)!r} in this recipe"
            for key in sorted(saved.keys() | now.keys())
            if saved.get(key) != now.get(key)
        ]
        if differences:
            raise CheckpointError(
                f"{checkpoint.path} was trained with another recipe:\n"
                + "\n".join(differences)
                + "\nReset these to resume, or give another --output to start a new run"
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
            fsync(path)
        read_checkpoint(part)
        final = self.folder / name
        shutil.rmtree(final, ignore_errors=True)  # left by an earlier, damaged or interrupted, save of this step
        part.rename(final)
        fsync(self.folder)

    def _prune(self, newest: int) -> None:
        """Remove all but the newest. Later ones are damaged, else the run would have resumed from them."""
        for path in self.folder.glob("step-*"):
            if int(path.name.removeprefix("step-")) > newest:
                shutil.rmtree(path)
        for path in sorted(self.folder.glob("step-*"))[: -self.recipe.checkpoint.keep]:
            shutil.rmtree(path)
        for path in self.folder.glob(".step-*.part"):  # left by a killed save
            shutil.rmtree(path)


def read_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint and verify all its files.

    Raises:
        CheckpointError: a file is missing or damaged, or the format has another version.
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
    """The newest intact checkpoint of a run directory, for any recipe; damaged ones are skipped with a warning.

    Raises:
        CheckpointError: there is none.
    """
    problems = []
    for path in sorted((run / "checkpoints").glob("step-*"), reverse=True):
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
    path = run / "checkpoints" / BEST
    if criterion != "last" and path.exists():
        best = read_checkpoint(path)
        if best.state["criterion"] == criterion:
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
        return recipe, chosen_checkpoint(run, recipe.evaluation.checkpoint)
    except (RecipeError, CheckpointError) as error:
        raise RecipeError(
            f"{setting} {run} is no trained run ({error}): train it with --output {run}, or {remedy}"
        ) from error


def resume_hint(run: Path) -> str:
    """How to resume an interrupted run, by the names in its folder; nothing is read or verified."""
    steps = sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))
    if not steps:
        return "There is no checkpoint yet: the same command starts again"
    return f"Run the same command again to resume from step {steps[-1]}"


def _is_lower(now: float | None, before: float | None) -> bool:
    """Whether a bound is tighter; None is no bound."""
    return now is not None and (before is None or now < before)


def _left_out(key: str, meaning: Mapping[str, Any]) -> bool:
    """Whether a section around the setting `key` was null."""
    parts = key.split(".")
    return any(".".join(parts[:n]) in meaning for n in range(1, len(parts)))


def _kept(named: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """Iterate over a collective to its end, keeping its tensors only if `keep`."""
    kept = {}
    for name, tensor in named:
        if keep:
            kept[name] = tensor.detach().cpu().contiguous()
    return kept

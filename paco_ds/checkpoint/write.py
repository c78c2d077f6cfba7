"""Write checkpoints whole or not at all, keep the newest, and resume a run from them."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from paco_ds.checkpoint.read import (
    BEST,
    FORMAT,
    MODEL,
    OLD,
    OPTIMIZER,
    QUEUE,
    STATE,
    STATE_DIGEST,
    VERSIONS,
    Checkpoint,
    newest_checkpoint,
    read_best,
    read_checkpoint,
    state_digest,
    step_folders,
)
from paco_ds.config.recipe import Recipe
from paco_ds.distributed.parts import Part
from paco_ds.errors import CheckpointError, NotFiniteError
from paco_ds.files import PARTIAL, fsync, remove_partial, sha256_file, storage_errors

logger = logging.getLogger(__name__)

LOWERED = ("optimizer.lr", "optimizer.clip_norm")
"""Settings that a resumed run may have lower, as the remedy for steps that are skipped."""

PART = ".part"  # ending of what is being written


class Writer(Protocol):
    """Runs the writing of checkpoints, one at a time."""

    def submit(self, write: Callable[[], None]) -> None:
        """Run it, now or later in another thread."""

    def wait(self) -> None:
        """Return when nothing is being written; what a write raised is raised here."""


class AtOnce:
    """Writes while the caller waits."""

    def submit(self, write: Callable[[], None]) -> None:
        write()

    def wait(self) -> None: ...


class Checkpoints:
    """The checkpoints of a run directory.

    Args:
        run: the run directory; checkpoints are in its folder checkpoints/.
        recipe, manifest_sha256: must be the same in a resumed run.
        writer: runs the writing, by default while the caller waits.
        together: makes whole tensors of the parts that ranks hold: on the rank that writes all, on others none. Run by
            the writer of every rank; needed where a save is given parts.
    """

    def __init__(
        self,
        run: Path,
        recipe: Recipe,
        manifest_sha256: str,
        writer: Writer | None = None,
        together: Callable[[Mapping[str, Tensor | Part]], Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.folder, self._together = run / "checkpoints", together
        self.recipe, self.manifest_sha256, self._writer = recipe, manifest_sha256, writer or AtOnce()
        self._host: dict[tuple[str, str], Tensor] = {}  # copies of the last save by (file, name)
        self.lowered: dict[str, tuple[Any, Any]] = {}  # by setting: (in the checkpoint, now)
        self._frozen: dict[str, str] | None = None  # of a run with frozen weights, see `Frozen`

    def save(
        self,
        step: int,
        model: Iterable[tuple[str, Tensor | Part]],
        optimizer: Iterable[tuple[str, Tensor | Part]],
        queue: Mapping[str, Tensor] | None,
        about: Mapping[str, Any],
        write: bool = True,
        epoch_steps: int | None = None,
        saved: Callable[[Path], None] | None = None,
    ) -> None:
        """Copy all tensors, and submit the writing of the checkpoint after `step` steps.

        Args:
            model, optimizer: (name, tensor or part) of all weights and buffers, and of all states of the optimizer.
                Every rank gives them, since that may be a collective; only a rank with `write` writes them.
            about: further entries of state.json (world size, versions).
            epoch_steps: steps of an epoch, for `checkpoint.keep_every_epochs`.
            saved: called with the folder once it is whole on disk, by whoever writes.

        Raises:
            NotFiniteError: a value is not finite; nothing is written, and earlier checkpoints stay.
            StorageError: the disk is full and the like; nothing of it is left, and earlier checkpoints stay.
        """
        self._writer.wait()
        files = {MODEL: self._copied(MODEL, model, write), OPTIMIZER: self._copied(OPTIMIZER, optimizer, write)}
        if queue is not None:
            files[QUEUE] = self._copied(QUEUE, queue.items(), write)
        state = self._state(step) | dict(about)

        def write_and_prune() -> None:
            wholes = self._whole(files)
            if not write:
                return
            self._write(f"step-{step:08d}", wholes, state)
            self._prune(step, epoch_steps)
            if saved is not None:
                saved(self.folder / f"step-{step:08d}")

        self._writer.submit(write_and_prune)

    def keep_frozen(self, weights: Mapping[str, Tensor]) -> None:
        """Write what is not trained, once for all checkpoints of the run; on the rank that writes them, before the
        first save. Checkpoints are then saved without it, and without the part of averages that is equal to it.

        Raises:
            NotFiniteError, StorageError: as `save`.
        """
        if not weights or self._frozen is not None:
            return
        tensors = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
        part = self.folder / f".frozen{PARTIAL}"
        self._refuse_not_finite(0, {"frozen": tensors})
        with storage_errors(part):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_tensors(part, tensors)
                sha256 = sha256_file(part)
                file = f"frozen-{sha256[:16]}.safetensors"
                fsync(part)
                part.replace(self.folder / file)
                fsync(self.folder)
            finally:
                _remove(part)
        self._frozen = {"file": file, "sha256": sha256}

    def _copied(self, file: str, named: Iterable[tuple[str, Tensor | Part]], keep: bool) -> dict[str, Tensor | Part]:
        """Iterate over what may be a collective to its end, copying to the host all parts, and tensors only if `keep`;
        training goes on with the originals. The memory of the last save is used again: to be given fresh pages takes
        longer than to copy."""
        copies: dict[str, Tensor | Part] = {}
        for name, own in named:
            if isinstance(own, Part):
                copies[name] = own._replace(values=self._copy(file, name, own.values))
            elif keep:
                copies[name] = self._copy(file, name, own)
        return copies

    def _copy(self, file: str, name: str, tensor: Tensor) -> Tensor:
        copy = self._host.get((file, name))
        if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._host[file, name] = copy
        return copy.copy_(tensor.detach())

    def _whole(self, files: Mapping[str, Mapping[str, Tensor | Part]]) -> Mapping[str, Mapping[str, Tensor]]:
        together = self._together or _all_whole
        return {file: together(named) for file, named in files.items()}

    def _state(self, step: int) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSIONS[-1],
            "step": step,
            "meaning": self.recipe.resume_identity(),
            "manifest_sha256": self.manifest_sha256,
            **({"frozen": self._frozen} if self._frozen else {}),
        }

    def save_best(
        self, step: int, model: Iterable[tuple[str, Tensor | Part]], about: Mapping[str, Any], write: bool = True
    ) -> None:
        """The weights after `step` steps as the best so far, in place of the previous best. As `save`, without
        optimizer and queue, since no run resumes from them."""
        self._writer.wait()
        files = {MODEL: self._copied(MODEL, model, write)}
        state = self._state(step) | {"criterion": self.recipe.evaluation.checkpoint} | dict(about)

        def write_best() -> None:
            wholes = self._whole(files)
            if write:
                self._write(BEST, wholes, state)

        self._writer.submit(write_best)

    def best(self, until: int) -> Checkpoint | None:
        """The best weights among the first `until` steps by the recipe's criterion, or None. Weights of a later step
        belong to steps that the resumed run repeats. The criterion may change on resume: weights of another one are
        ignored, and so are damaged ones, with a warning: a run is not lost with them.

        Raises:
            CheckpointError: of another recipe or other data.
        """
        try:
            checkpoint = read_best(self.folder, self.recipe.evaluation.checkpoint)
        except CheckpointError as error:
            logger.warning("%s; the best weights are those of later evaluations", error)
            return None
        if checkpoint is None or checkpoint.step > until:
            return None
        self._check_resume_identity(checkpoint)
        return checkpoint

    def latest(self) -> Checkpoint | None:
        """The newest intact checkpoint of this run, or None without checkpoints.

        Raises:
            CheckpointError: it is of another recipe or other data, or all checkpoints are damaged.
        """
        if not step_folders(self.folder):
            return None
        checkpoint = newest_checkpoint(self.folder.parent)
        self.lowered = self._check_resume_identity(checkpoint)
        self._frozen = checkpoint.state.get("frozen")
        return checkpoint

    def _check_resume_identity(self, checkpoint: Checkpoint) -> dict[str, tuple[Any, Any]]:
        """The settings that are lower now, by (in the checkpoint, now); CheckpointError for all other differences."""
        now = json.loads(json.dumps(self.recipe.resume_identity()))
        saved = checkpoint.state["meaning"]
        # a setting newer than the checkpoint had its default value, except in a section that was null
        younger = {key: self.recipe.default(key) for key in now.keys() - saved.keys() if not _left_out(key, saved)}
        saved = younger | saved
        lowered = {key: (saved[key], now[key]) for key in LOWERED if _is_lower(now[key], saved[key])}
        saved = {**saved, **{key: now[key] for key in lowered}}
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
        return lowered

    def _write(self, name: str, files: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> None:
        self._refuse_not_finite(state["step"], files)
        final, part = self.folder / name, self.folder / f".{name}{PART}"
        with storage_errors(final):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                _remove(part)
                part.mkdir()
                for file, tensors in files.items():
                    write_tensors(part / file, tensors)
                state["sha256"] = {file: sha256_file(part / file) for file in files}
                state[STATE_DIGEST] = state_digest(json.loads(json.dumps(state)))
                (part / STATE).write_text(json.dumps(state, indent=1))
                for path in (*part.iterdir(), part):
                    fsync(path)
                read_checkpoint(part)
                _put_in_place(part, final)
            except BaseException:
                _remove(part)
                raise

    def _refuse_not_finite(self, step: int, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        bad = [f"{name} ({file})" for file, tensors in files.items() for name, t in tensors.items() if not _finite(t)]
        if bad:
            kept = sorted(step_folders(self.folder))
            earlier = f"that of step {kept[-1]} is kept" if kept else "there is none before it"
            raise NotFiniteError(
                f"{len(bad)} of the tensors after step {step} are not finite, the first {bad[0]}: no checkpoint is "
                f"written, {earlier}. Resume with a lower optimizer.lr or optimizer.clip_norm"
            )

    def _prune(self, newest: int, epoch_steps: int | None) -> None:
        """Remove all but the newest and those kept for good. Later ones are damaged, else the run would have resumed
        from them."""
        settings, folders = self.recipe.checkpoint, step_folders(self.folder)
        earlier = sorted(step for step in folders if step <= newest)
        every = settings.keep_every_epochs
        for_good = {step for step in earlier if every and epoch_steps and step % (every * epoch_steps) == 0}
        for step in folders.keys() - {*earlier[-settings.keep :], *for_good}:
            _remove(folders[step])


def recover(run: Path) -> None:
    """Finish what a killed process left in a run directory: an old checkpoint whose replacement was not put in place
    comes back, and unfinished files are removed. Only for the process that holds the directory."""
    folder = run / "checkpoints"
    for old in _entries(folder, OLD):
        final = old.with_name(old.name.removeprefix(".").removesuffix(OLD))
        if not os.path.lexists(final):
            with storage_errors(final):
                old.rename(final)
        _remove(old)
    for part in _entries(folder, PART):
        _remove(part)
    remove_partial(run)
    remove_partial(folder)


def _entries(folder: Path, ending: str) -> list[Path]:
    return [path for path in folder.glob(f".*{ending}") if re.fullmatch(r"\.(best|step-\d+)\.\w+", path.name)]


def _put_in_place(part: Path, final: Path) -> None:
    """Rename a whole checkpoint to its name; one of that name is removed after that. Killed anywhere, one is whole."""
    old = final.with_name(f".{final.name}{OLD}")
    if os.path.lexists(final):
        _remove(old)
        final.rename(old)
    part.rename(final)
    fsync(final.parent)
    _remove(old)


def _remove(path: Path) -> None:
    """Remove a folder, file or link; what a reader on NFS keeps open is left, and goes with the next removal."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file of safetensors.

    Raises:
        OSError: the disk is full and the like; safetensors tells that in its text alone.
    """
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        if not (number := re.search(r"\(os error (\d+)\)", str(error))):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _all_whole(named: Mapping[str, Tensor | Part]) -> dict[str, Tensor]:
    whole = {name: tensor for name, tensor in named.items() if isinstance(tensor, Tensor)}
    if parts := named.keys() - whole.keys():
        raise ValueError(f"Checkpoints needs `together` for parts, such as of {min(parts)}")
    return whole


def _finite(tensor: Tensor) -> bool:
    """Whether all values are finite; by numpy, which leaves torch's threads to training."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    values = (tensor.float() if tensor.itemsize < 4 else tensor).numpy()  # numpy has no bfloat16
    return bool(abs(values.min()) < float("inf") and abs(values.max()) < float("inf"))


def _is_lower(now: float | None, before: float | None) -> bool:
    """Whether a bound is tighter; None is no bound."""
    return now is not None and (before is None or now < before)


def _left_out(key: str, meaning: Mapping[str, Any]) -> bool:
    """Whether a section around the setting `key` was null."""
    parts = key.split(".")
    return any(".".join(parts[:n]) in meaning for n in range(1, len(parts)))

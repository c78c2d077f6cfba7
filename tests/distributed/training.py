"""What the ranks of a pool run in the tests of whole trainings: the trainer on small shards."""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from errno import ENOSPC
from math import inf
from os import strerror
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from paco_ds.checkpoint import Checkpoints
from paco_ds.config.load import load_recipe
from paco_ds.data.stream.batches import MicroBatch
from paco_ds.distributed.heartbeat import Heartbeat
from paco_ds.distributed.ranks import ByteCounter, HostCopy, Ranks
from paco_ds.errors import DataError, NotFiniteError, UserError
from paco_ds.evaluation.split import EvaluationSplit
from paco_ds.metrics.targets import served_metrics
from paco_ds.training.images_ahead import ImagesAhead
from paco_ds.training.optimizer import UsualNorm
from paco_ds.training.replay import read_kept_step, replay
from paco_ds.training.step_result import StepResult
from paco_ds.training.trainer import Trainer


def train(
    ranks: Ranks, recipe: Path, run: Path, overrides: tuple[str, ...] = (), stop_at_step: int | None = None
) -> int:
    """Run the trainer; returns the number of steps done."""
    with _trainer(ranks, recipe, run, overrides, stop_at_step) as trainer:
        trainer.run()
    return trainer.steps_done


@contextmanager
def _trainer(
    ranks: Ranks,
    recipe: Path,
    run: Path,
    overrides: tuple[str, ...] = (),
    stop_at_step: int | None = None,
    **given: Any,
) -> Iterator[Trainer]:
    trainer = Trainer(load_recipe(recipe, overrides), run, ranks, stop_at_step, **given)
    try:
        yield trainer
    finally:
        trainer.close()
        trainer.engine.destroy()
        ranks.on_bytes = ByteCounter()


def words_of_training(
    ranks: Ranks, recipe: Path, run: Path, overrides: tuple[str, ...] = (), stop_at_step: int | None = None
) -> str:
    """What the trainer says while it runs."""
    said: list[object] = []
    with _trainer(ranks, recipe, run, overrides, stop_at_step) as trainer:
        trainer.logger.say = said.append  # type: ignore[assignment]
        trainer.run()
    return "\n".join(text for text in said if isinstance(text, str))


def scrape_while_training(ranks: Ranks, recipe: Path, run: Path) -> dict[str, str]:
    """Three steps, then the first rank fetches /metrics of every rank named in metrics_targets.json."""
    pages = {}
    heartbeat, settings = Heartbeat(), load_recipe(recipe).metrics
    with (
        served_metrics(settings, run, ranks, {}, heartbeat) as metrics,
        _trainer(ranks, recipe, run, heartbeat=heartbeat, metrics=metrics) as trainer,
    ):
        for _ in range(3):
            trainer.train_step()
        trainer.read_figures()
        ranks.wait_for_all()  # else another rank may not have counted its last step yet
        if ranks.first:
            for target in json.loads((run / "metrics_targets.json").read_text()):
                with urllib.request.urlopen(f"http://{target['targets'][0]}/metrics", timeout=60) as answer:
                    pages[target["labels"]["rank"]] = answer.read().decode()
        ranks.wait_for_all()
    return pages


def steps_when_read(ranks: Ranks, recipe: Path, run: Path, overrides: tuple[str, ...]) -> dict[int, int]:
    """As `train`: {number of a step, from 1: steps taken when its figures were read}."""
    copies: list[HostCopy] = []
    read: dict[int, int] = {}
    begin, wait = HostCopy.__init__, HostCopy.wait

    def begun(copy: HostCopy, tensor: torch.Tensor) -> None:
        copies.append(copy)
        begin(copy, tensor)

    def waited(copy: HostCopy) -> torch.Tensor:
        read.setdefault(copies.index(copy) + 1, trainer.steps_done)
        return wait(copy)

    with (
        _trainer(ranks, recipe, run, overrides) as trainer,
        mock.patch.object(HostCopy, "__init__", begun),
        mock.patch.object(HostCopy, "wait", waited),
    ):
        trainer.reads_late = True  # as beside a GPU
        trainer.run()
    return read


def train_with_a_flipped_bit(ranks: Ranks, recipe: Path, run: Path, rank: int, after: int) -> None:
    """As `train` with a digest every 2 steps; one bit of the queue of `rank` changes after `after` steps."""
    with _trainer(ranks, recipe, run, ("engine.digest_every=2",)) as trainer:
        take_step = trainer.train_step

        def step_then_flip() -> StepResult:
            result = take_step()
            if trainer.steps_done == after and ranks.rank == rank:
                trainer.queue.keys_KD.view(torch.int32)[1, 1] ^= 1
            return result

        trainer.train_step = step_then_flip
        trainer.run()


def train_until_unreadable(ranks: Ranks, recipe: Path, run: Path, overrides: tuple[str, ...], step: int) -> None:
    """As `train`; the images of `step` (from 0) and of all later ones cannot be read by any rank."""
    with _trainer(ranks, recipe, run, overrides) as trainer:
        readable = trainer.stream

        def steps() -> Iterator[Sequence[MicroBatch]]:
            yield from itertools.islice(readable, step)
            raise DataError("the next shard is gone")

        trainer.images = ImagesAhead(steps(), trainer.step.begin_exchange, trainer._looks_ahead, start=0)
        trainer.run()


def replay_kept_step(ranks: Ranks, folder: Path) -> list[str]:
    """What `paco-train --replay` prints."""
    return replay(read_kept_step(folder), ranks).lines()


def train_with_private_directory(ranks: Ranks, recipe: Path, run: Path) -> int:
    """As `train`, but ranks other than the first look into a directory of their own."""
    return train(ranks, recipe, run if ranks.first else run.with_name("elsewhere"), stop_at_step=2)


def train_with_own_settings(ranks: Ranks, recipe: Path, run: Path, overrides: tuple[str, ...]) -> int:
    """As `train`, but ranks other than the first have settings of their own."""
    return train(ranks, recipe, run, () if ranks.first else overrides, stop_at_step=1)


def train_without_best(ranks: Ranks, recipe: Path, run: Path) -> int:
    """As `train`, but ranks other than the first cannot read the best weights."""
    with mock.patch.object(Checkpoints, "best", Checkpoints.best if ranks.first else lambda *_, **__: None):
        return train(ranks, recipe, run)


def marks_of_training(ranks: Ranks, recipe: Path, run: Path) -> int:
    """As `train`; how many marks this rank set."""
    heartbeat = Heartbeat()
    with _trainer(ranks, recipe, run, heartbeat=heartbeat) as trainer:
        trainer.run()
    return heartbeat.last.count


def replayed_outlier(ranks: Ranks, recipe: Path, run: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    """As `train`, whose usual gradient norm is far below any, and which ends with the first skipped step; then what
    became of that step when it was replayed, and the parts of its loss."""
    settings = (*overrides, "engine.max_grad_norm_ratio=10", "engine.max_skipped=1")
    with _trainer(ranks, recipe, run, settings) as trainer:
        trainer.step.usual_norm = UsualNorm(log_mean=-20.0, steps=100)
        with pytest.raises(NotFiniteError):
            trainer.run()
    (kept,) = run.glob("skipped-step-*")
    result = replay(read_kept_step(kept), ranks).result
    return {"skipped": result.skipped, "ratio": result.grad_norm_ratio, **result.parts}


def leave_evaluation(ranks: Ranks, recipe: Path, run: Path, rank: int) -> list[int]:
    """As `train`, an image a batch; `rank` receives SIGTERM with its first image of the first evaluation. Returns the
    steps done, and the images that this rank evaluated."""
    evaluated = 0

    def told(split: EvaluationSplit, ranks: Ranks) -> Iterator[MicroBatch]:
        nonlocal evaluated
        for evaluated, batch in enumerate(batches(split, ranks), 1):
            if evaluated == 1 and ranks.rank == rank:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    batches = EvaluationSplit.batches
    settings = ("evaluation.batch=1", "evaluation.every_epochs=1")
    with mock.patch.object(EvaluationSplit, "batches", told), _trainer(ranks, recipe, run, settings) as trainer:
        assert trainer.run() is None
    return [trainer.steps_done, evaluated]


def train_until_terminated(ranks: Ranks, recipe: Path, run: Path, rank: int, after: int) -> int:
    """As `train`; `rank` receives SIGTERM after `after` steps, as from a scheduler. Returns the steps done."""
    with _trainer(ranks, recipe, run) as trainer:
        take_step = trainer.train_step

        def step_then_signal() -> StepResult:
            result = take_step()
            if trainer.steps_done == after and ranks.rank == rank:
                os.kill(os.getpid(), signal.SIGTERM)
            return result

        trainer.train_step = step_then_signal
        trainer.run()
    return trainer.steps_done


def refusal_of_training(
    ranks: Ranks, recipe: Path, run: Path, overrides: tuple[str, ...], fault: str = "", after: int = -1
) -> tuple[str, str]:
    """Name and message of the error that ends a training. After so many steps the disk of the first rank is full, or a
    running variance of all ranks is infinite. What is written beside training has ended when the next step begins."""
    try:
        with _trainer(ranks, recipe, run, overrides) as trainer, pytest.MonkeyPatch.context() as patch:
            take_step, save = trainer.train_step, trainer.save

            def save_and_wait() -> None:
                save()
                wait(filter(None, [trainer.saver._under_way]))

            def step_then_fault() -> StepResult:
                result = take_step()
                if trainer.steps_done == after and fault == "disk full":
                    patch.setattr("paco_ds.checkpoint.write.save_file", _full_disk)
                if trainer.steps_done == after and fault == "not finite":
                    next(b for n, b in trainer.engine.module.named_buffers() if n.endswith("running_var")).fill_(inf)
                return result

            trainer.train_step, trainer.save = step_then_fault, save_and_wait
            trainer.run()
    except UserError as error:
        return type(error).__name__, str(error)
    return "", ""


def _full_disk(*_: object) -> None:
    raise OSError(ENOSPC, strerror(ENOSPC))


def free_memory(ranks: Ranks) -> None:
    """Of models that earlier runs left in cycles of references, which Python collects when it sees fit."""
    gc.collect()

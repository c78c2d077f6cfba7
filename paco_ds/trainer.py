"""A training run from its first step, or from its last checkpoint, to its report.

`Trainer.run` is the story; what it calls lives in the components.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from paco_ds import engine as ds
from paco_ds.checkpoint import Checkpoint, Checkpoints
from paco_ds.data.manifest import Manifest, load_manifest
from paco_ds.data.stream import MicroBatch, Replaced, TrainingStream
from paco_ds.distributed import MicroBatchLayout, Ranks
from paco_ds.errors import DataError, RecipeError
from paco_ds.evaluation.accuracy import ShotAccuracy
from paco_ds.evaluation.results import now, versions, write_results
from paco_ds.evaluation.runner import evaluate
from paco_ds.key_encoder import KeyEncoder
from paco_ds.key_queue import KeyQueue
from paco_ds.losses.paco import ParametricContrastiveLoss, class_prior
from paco_ds.metrics.exporter import Exporter, MetricsSink, NullExporter, reachable_host, write_targets
from paco_ds.metrics.log import MetricsLog, StepRecord
from paco_ds.metrics.progress import progress_view
from paco_ds.models.recogniser import make_recogniser
from paco_ds.optimizer import learning_rate
from paco_ds.recipe import Recipe
from paco_ds.report.run_report import write_report
from paco_ds.step import Step, StepResult, prove_ranks_agree
from paco_ds.zero import set_momentum, stage_of, whole_model, whole_momentum

logger = logging.getLogger(__name__)


class Trainer:
    """One run of a recipe in a run directory, on this rank.

    Args:
        run: the run directory, shared by all ranks; a run found there goes on where it stopped.
        stop_at_step: write a checkpoint after this many steps and end, as if asked to stop.

    Raises:
        UserError: recipe, shards or checkpoint do not fit each other.
    """

    def __init__(self, recipe: Recipe, run: Path, ranks: Ranks, stop_at_step: int | None = None) -> None:
        self.recipe, self.run_dir, self.ranks, self.stop_at_step = recipe, run, ranks, stop_at_step
        self.started = now()
        self.manifest = open_data(recipe)
        step = recipe.step
        self.layout = MicroBatchLayout(step.micro_batch, step.micro_batches, ranks.rank, ranks.world_size)
        config = ds.read_deepspeed_config(recipe.engine.deepspeed)
        self.checkpoints = Checkpoints(run, recipe, self.manifest.sha256)
        checkpoint = self._agreed(self.checkpoints.latest())

        self.steps_done = checkpoint.step if checkpoint else 0
        # loader processes start before threads do
        self.stream = TrainingStream(recipe, self.manifest, self.layout, start=self.steps_done)
        self.batches = iter(self.stream)
        manifest = self.manifest
        model = make_recogniser(recipe, len(manifest.classes), manifest.mean, manifest.std)
        if checkpoint:
            model.load_state_dict(checkpoint.model())
        self.engine, self.optimizer = ds.initialise(model, recipe, config, self.layout)
        self.queue, self.step = self._make_step()
        if checkpoint:
            set_momentum(self.engine, checkpoint.momentum())
            if self.queue is not None:
                self.queue.load_state_dict(checkpoint.queue())
        self._open_watchers()

    # --- the story ------------------------------------------------------------------------------------------

    def run(self) -> ShotAccuracy | None:
        """Train to the end, evaluate, report. None if the run was stopped before its end."""
        self._announce()
        while self.steps_done < self.total_steps:
            self.train_step()
            at_epoch_end = self.steps_done % self.steps_per_epoch == 0
            if at_epoch_end:
                self._after_epoch()
            stopping = self.stop_agreed or self.steps_done == self.stop_at_step
            if stopping or self._checkpoint_due(at_epoch_end):
                self.save()
            if stopping and self.steps_done < self.total_steps:
                self.progress.message(f"stopped after step {self.steps_done}; the same command goes on from here")
                return None
        return self._finish()

    def train_step(self) -> StepResult:
        """One optimizer step: wait for its images, take it, tell what came of it."""
        began = time.perf_counter()
        micro_batches = next(self.batches)
        waited = time.perf_counter() - began
        number = self.steps_done
        lr = learning_rate(self.recipe, number, self.steps_per_epoch)
        result = self.step(number, micro_batches, lr)
        self.steps_done += 1
        self.stop_agreed = result.stop
        self._account_for_replaced(micro_batches, result)
        seconds = time.perf_counter() - began
        record = StepRecord(
            step=self.steps_done,
            epoch=number // self.steps_per_epoch,
            loss=result.loss,
            lr=lr,
            grad_norm=result.grad_norm,
            images_per_second=self.layout.global_batch / seconds,
            data_wait_seconds=waited,
            step_seconds=seconds,
            queue_fill=self.queue.fill_ratio if self.queue is not None else 0.0,
            center_probability=result.center_probability,
            center_probability_optimum=result.center_probability_optimum,
            skipped=result.refused is not None,
            bad_samples=result.replaced,
        )
        self.log.step(record)
        self.metrics.observe_step(record, self.layout.accumulation * self.layout.micro_batch)
        self.progress.update(record)
        if result.refused:
            self.progress.message(f"step {self.steps_done}: {result.refused} not finite; nothing was changed")
        every = self.recipe.engine.digest_every
        if every and self.steps_done % every == 0:
            prove_ranks_agree(self.step)
        return result

    def evaluate(self, split: str) -> ShotAccuracy:
        """Accuracy of the weights as they stand."""
        accuracy = evaluate(self.engine, self.engine.module, self.recipe, self.manifest, split, self.ranks)
        self.metrics.observe_accuracy(accuracy)
        epoch = self.steps_done // self.steps_per_epoch
        self.log.evaluation(self.steps_done, epoch, split, accuracy)
        return accuracy

    def save(self) -> None:
        """Write a checkpoint of the run as it stands."""
        began = time.perf_counter()
        self.checkpoints.save(
            self.steps_done,
            whole_model(self.engine),
            whole_momentum(self.engine),
            self.queue.state_dict() if self.queue is not None else None,
            about={
                "world_size": self.ranks.world_size,
                "zero_stage": stage_of(self.engine),
                "scale": self.recipe.step.scale,
                "epoch": self.steps_done / self.steps_per_epoch,
                "versions": versions(),
            },
            write=self.ranks.first,
        )
        self.ranks.wait_for_all()
        self.metrics.checkpoint_blocked(time.perf_counter() - began)

    def close(self) -> None:
        """Stop what runs beside training."""
        self.progress.close()
        self.log.close()
        self.metrics.close()

    # --- its parts ------------------------------------------------------------------------------------------

    @property
    def total_steps(self) -> int:
        return self.stream.plan.total_steps

    @property
    def steps_per_epoch(self) -> int:
        return self.stream.plan.steps_per_epoch

    def _agreed(self, checkpoint: Checkpoint | None) -> Checkpoint | None:
        """Every rank must go on from the same step: the run directory has to be shared."""
        found = [
            int(s)
            for s in self.ranks.gather(torch.tensor(checkpoint.step if checkpoint else 0, device=self.ranks.device))
        ]
        if len(set(found)) > 1:
            steps = ", ".join(f"rank {rank}: {step}" for rank, step in enumerate(found))
            raise RecipeError(
                f"ranks found different checkpoints in {self.run_dir} ({steps}): "
                f"put --output on storage that all hosts share"
            )
        return checkpoint

    def _make_step(self) -> tuple[KeyQueue | None, Step]:
        recipe, manifest, settings = self.recipe, self.manifest, self.recipe.loss
        counts = manifest.split(recipe.data.train_split).class_counts
        loss = ParametricContrastiveLoss(
            alpha=settings.alpha,
            beta=settings.beta,
            gamma=settings.gamma,
            temperature=settings.temperature,
            supt=settings.supt,
            smoothing=settings.smoothing,
            normalization=settings.normalization,
            log_prior_C=class_prior(counts, manifest.classes) if settings.uses_class_prior else None,
            contrast=settings.contrast,
        ).to(self.ranks.device)
        queue, key_encoder = None, None
        if settings.contrast:
            queue = KeyQueue(recipe.queue.length, recipe.model.projection_dim, self.ranks.device)
            key_encoder = KeyEncoder(
                self.engine,
                self.layout,
                self.ranks,
                momentum=recipe.key_encoder.momentum,
                batch_norm=recipe.key_encoder.batch_norm,
                seed=recipe.seed,
            )
        asked_to_stop = _stop_signals()
        shots = manifest.shots_of_classes(recipe.data.train_split)
        step = Step(
            self.engine,
            self.optimizer,
            loss,
            self.layout,
            self.ranks,
            shots,
            key_encoder,
            queue,
            stop_requested=lambda: bool(asked_to_stop),
        )
        return queue, step

    def _open_watchers(self) -> None:
        first = self.ranks.first
        if first:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            (self.run_dir / "recipe.yaml").write_text(self.recipe.to_yaml())
        self.log = MetricsLog(self.run_dir / "metrics.jsonl" if first else None)
        self.log.cut_after(self.steps_done if self.steps_done else -1)
        self.metrics = self._serve_metrics()
        self.ranks.on_bytes = self.metrics.add_collective_bytes
        self.progress = progress_view(
            self.ranks.rank,
            total_steps=self.total_steps,
            first_step=self.steps_done,
            epochs=self.recipe.schedule.epochs,
            every=self.recipe.metrics.log_every,
        )
        self.stop_agreed = False
        self._replaced: list[Replaced] = []
        self._replaced_in_epoch = 0

    def _serve_metrics(self) -> MetricsSink:
        sink: MetricsSink = Exporter() if self.recipe.metrics.serve else NullExporter()
        port = sink.start(self.recipe.metrics.port, self.ranks.local_rank)
        sink.build_info({**versions(), "method": self.recipe.loss.method, "world_size": str(self.ranks.world_size)})
        address = f"{reachable_host(_master())}:{port}" if port else None
        addresses = self.ranks.gather_objects(address)
        if self.ranks.first:
            write_targets(self.run_dir / "metrics_targets.json", addresses, self.recipe.name)
        return sink

    def _announce(self) -> None:
        recipe, layout = self.recipe, self.layout
        data = self.manifest.split(recipe.data.train_split)
        say = self.progress.message
        say(
            f"{recipe.name}: {recipe.loss.method} with {recipe.model.backbone} on {data.samples} images of "
            f"{len(self.manifest.classes)} classes; {self.ranks.world_size} ranks on {self.ranks.device.type}, ZeRO "
            f"stage {stage_of(self.engine)}; a step is {layout.micro_batches} micro-batches of {layout.micro_batch} "
            f"({layout.accumulation} a rank)"
        )
        if recipe.step.scale != 1:
            say(
                f"scaled: {layout.micro_batches} micro-batches a step where the recipe has "
                f"{recipe.step.reference_micro_batches}, so the peak learning rate is {recipe.lr:g}"
            )
            if recipe.loss.contrast and recipe.queue.length < 4 * layout.global_batch:
                say(
                    f"queue.length {recipe.queue.length} is under four global batches; consider "
                    f"--set queue.length={4 * layout.global_batch}"
                )
        if self.steps_done:
            say(f"goes on from the checkpoint of step {self.steps_done} of {self.total_steps}")

    def _account_for_replaced(self, micro_batches: list[MicroBatch], result: StepResult) -> None:
        for replaced in (r for batch in micro_batches for r in batch.replaced):
            self._replaced.append(replaced)
            self.metrics.observe_bad_sample(replaced.reason)
            logger.warning("sample %s of %s was replaced: %s", replaced.key, replaced.shard, replaced.reason)
        self._replaced_in_epoch += result.replaced
        limit = self.recipe.data.max_bad_share * self.layout.global_batch * self.steps_per_epoch
        if self._replaced_in_epoch > limit:
            every = [r for of_rank in self.ranks.gather_objects(self._replaced) for r in of_rank]
            names = "\n".join(f"  {r.key} of {r.shard}: {r.reason}" for r in every[:50])
            raise DataError(
                f"{self._replaced_in_epoch} samples of this epoch could not be read, more than data.max_bad_share = "
                f"{self.recipe.data.max_bad_share:g} allows:\n{names}\nRun tools/build_shards.py check "
                f"{self.manifest.directory}, then mend the shards or raise data.max_bad_share"
            )

    def _after_epoch(self) -> None:
        self._replaced_in_epoch = 0
        self._replaced.clear()
        every, epoch = self.recipe.evaluation.every_epochs, self.steps_done // self.steps_per_epoch
        if every and (epoch % every == 0 or self.steps_done == self.total_steps):
            split = self.recipe.evaluation.split
            if split in self.manifest.splits:
                self.progress.message(f"epoch {epoch}, {split}: {_one_line(self.evaluate(split))}")

    def _checkpoint_due(self, at_epoch_end: bool) -> bool:
        settings = self.recipe.checkpoint
        if self.steps_done == self.total_steps:
            return True
        if settings.every_steps and self.steps_done % settings.every_steps == 0:
            return True
        return at_epoch_end and (self.steps_done // self.steps_per_epoch) % settings.every_epochs == 0

    def _finish(self) -> ShotAccuracy:
        split = self.recipe.evaluation.test_split
        accuracy = self.evaluate(split)
        if self.ranks.first:
            write_results(
                self.run_dir / "metrics.json",
                accuracy,
                self.recipe,
                self.manifest,
                split=split,
                step=self.steps_done,
                world_size=self.ranks.world_size,
                started=self.started,
            )
            report = write_report(self.run_dir)
            self.progress.close()
            self.progress.message(accuracy.table(f"{self.recipe.name} on {split}"))
            self.progress.message(f"report: {report}")
        return accuracy


def open_data(recipe: Recipe) -> Manifest:
    """The manifest of a recipe's shards, with every split that training needs checked to be there in full size.

    Raises:
        DataError: shards are missing, cut, or do not have the recipe's number of classes.
    """
    manifest = load_manifest(recipe.data.shards)
    if recipe.data.classes is not None and recipe.data.classes != len(manifest.classes):
        raise DataError(
            f"data.classes is {recipe.data.classes}, but {manifest.directory} has {len(manifest.classes)} classes: "
            f"point data.shards at other shards or set data.classes={len(manifest.classes)}"
        )
    wanted = {recipe.data.train_split, recipe.evaluation.test_split}
    if recipe.evaluation.every_epochs:
        wanted.add(recipe.evaluation.split)
    for split in sorted(wanted):
        manifest.check_files(split)
    return manifest


def _stop_signals() -> list[int]:
    """A list that SIGTERM (preemption, a scheduler's time limit) makes true: the step under way is finished first."""
    received: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    return received


def _master() -> str:
    return os.environ.get("MASTER_ADDR", "127.0.0.1")


def _one_line(accuracy: ShotAccuracy) -> str:
    shots: Iterator[str] = (
        f"{name} {100 * value:.1f}" if value is not None else f"{name} -" for name, value in accuracy.top1().items()
    )
    return "  ".join(shots)

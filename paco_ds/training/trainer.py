"""A training run from its first step, or from its last checkpoint, to its report.

`Trainer.run` is the story; what it calls lives in the components.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from paco_ds.checkpoint import Checkpoint, Checkpoints
from paco_ds.config.recipe import Recipe
from paco_ds.contrast.key_encoder import PendingImages, make_key_encoder
from paco_ds.contrast.key_queue import KeyQueue
from paco_ds.data.manifest import open_data
from paco_ds.data.stream.batches import MicroBatch, TrainingStream
from paco_ds.distributed.ranks import MicroBatchLayout, Ranks
from paco_ds.distributed.zero import set_momentum, stage_of, whole_model, whole_momentum
from paco_ds.errors import RecipeError, TrainingError
from paco_ds.evaluation.accuracy import ShotAccuracy
from paco_ds.evaluation.results import now, versions, write_results
from paco_ds.evaluation.runner import evaluate, load_recogniser
from paco_ds.files import replace_text
from paco_ds.losses import make_loss
from paco_ds.losses.distillation import Distillation
from paco_ds.metrics.log import StepRecord
from paco_ds.metrics.run_logger import BadSamples, RunLogger
from paco_ds.models.recogniser import make_recogniser
from paco_ds.report import write_report
from paco_ds.training import engine as ds
from paco_ds.training.initial_weights import freeze, load_initial_weights
from paco_ds.training.mixup import Mixup
from paco_ds.training.optimizer import learning_rate
from paco_ds.training.step import Step, StepResult, check_replicas_equal
from paco_ds.training.stop_request import StopRequest
from paco_ds.training.teacher import Teacher


@dataclass(frozen=True)
class _StepImages:
    """A step's micro-batches of this rank, and its key images on their way where there is a key encoder."""

    micro_batches: Sequence[MicroBatch]
    keys: PendingImages | None


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
        self.manifest = manifest = open_data(recipe, _splits(recipe))
        self.layout = MicroBatchLayout(recipe.step.micro_batch, recipe.step.micro_batches, ranks.rank, ranks.world_size)
        config = ds.read_deepspeed_config(recipe.engine.deepspeed)
        self.checkpoints = Checkpoints(run, recipe, manifest.sha256)
        checkpoint = self._agreed(self.checkpoints.latest())

        self.steps_done = checkpoint.step if checkpoint else 0
        best = self.checkpoints.best(until=self.steps_done)
        self.best_score = best.state["score"] if best else -1.0
        self.skipped_in_a_row = 0
        distill = recipe.loss.distill
        self.teacher = None if distill is None else Teacher(distill, manifest, ranks.device)
        if checkpoint and self.teacher:
            self.teacher.check_taught(checkpoint)
        self.stop_request, self.stop_agreed = StopRequest(), False
        # loader processes start here, before DeepSpeed's and the metrics' threads do
        self.stream = TrainingStream(recipe, manifest, self.layout, start=self.steps_done)
        model = make_recogniser(recipe, len(manifest.classes), manifest.mean, manifest.std)
        if checkpoint:  # before DeepSpeed copies the weights
            model.load_state_dict(checkpoint.model())
        else:
            load_initial_weights(model, recipe)
        freeze(model, recipe.model)
        self.engine, self.optimizer = ds.initialise(model, recipe, config, self.layout, ranks)
        self.queue, self.step = self._make_step()
        self._next: _StepImages | None = None
        if checkpoint:
            set_momentum(self.engine, checkpoint.momentum())
            if self.queue is not None:
                self.queue.load_state_dict(checkpoint.queue())
        if ranks.first:
            run.mkdir(parents=True, exist_ok=True)
            replace_text(run / "recipe.yaml", recipe.to_yaml())  # a second stage may be reading it
        self.watch = RunLogger(recipe, run, ranks, total_steps=self.total_steps, steps_done=self.steps_done)
        self.bad_samples = BadSamples(self.watch, recipe, ranks, self.steps_per_epoch * self.layout.global_batch)

    def run(self) -> ShotAccuracy | None:
        """Train to the end, evaluate, report. None if the run was stopped before its end."""
        self._announce()
        while self.steps_done < self.last_step and not self.stop_agreed:
            self.train_step()
            if self.steps_done % self.steps_per_epoch == 0:
                self._after_epoch()
            if self.stop_agreed or self.steps_done == self.last_step or self._checkpoint_due(self.steps_done):
                self.save()
        if self.steps_done < self.total_steps:
            if self._next and self._next.keys:
                self._next.keys.take()  # no rank leaves while another still receives
            self.watch.say(f"stopped after step {self.steps_done} of {self.total_steps}; it can go on from here")
            return None
        return self._finish()

    def train_step(self) -> StepResult:
        """One optimizer step: wait for its images, take it, tell what came of it."""
        began = time.perf_counter()
        number = self.steps_done
        self._waited = 0.0
        images = self._next or self._images_of(number)
        # one step ahead: its key images go from rank to rank while this step computes
        self._next = self._images_of(number + 1) if self._looks_ahead(number + 1) else None
        lr = learning_rate(self.recipe, number, self.steps_per_epoch)
        result = self.step(number, images.micro_batches, lr, images.keys)
        self.steps_done += 1
        self.stop_agreed = result.stop
        seconds = time.perf_counter() - began
        record = StepRecord(
            step=self.steps_done,
            epoch=number // self.steps_per_epoch,
            loss=result.loss,
            lr=lr,
            grad_norm=result.grad_norm,
            images_per_second=self.layout.global_batch / seconds,
            data_wait_seconds=self._waited,
            step_seconds=seconds,
            queue_fill=self.queue.fill_ratio if self.queue is not None else 0.0,
            center_probability=result.center_probability,
            center_probability_optimum=result.center_probability_optimum,
            positive_probability=result.positive_probability,
            positive_probability_optimum=result.positive_probability_optimum,
            parts=result.parts,
            skipped=result.skipped is not None,
            bad_samples=result.replaced,
        )
        self.watch.step(record, self.layout.accumulation * self.layout.micro_batch, result.skipped)
        mine = ((r.key, r.shard, r.reason) for batch in images.micro_batches for r in batch.replaced)
        self.bad_samples.add(mine, on_all_ranks=result.replaced)
        self._abort_after_repeated_skips(result)
        every = self.recipe.engine.digest_every
        if every and self.steps_done % every == 0:
            check_replicas_equal(self.step)
        return result

    def evaluate(self, split: str) -> ShotAccuracy:
        """Accuracy of the weights as they stand."""
        return evaluate(self.engine, self.engine.module, self.recipe, self.manifest, split, self.ranks)

    def _evaluate_checkpoint(self, checkpoint: Checkpoint, split: str) -> ShotAccuracy:
        """Accuracy of saved weights, in the precision they were trained with."""
        recipe, manifest, device = self.recipe, self.manifest, self.ranks.device
        model = load_recogniser(checkpoint, recipe, manifest).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=checkpoint.state["autocast"]):
            return evaluate(model, model, recipe, manifest, split, self.ranks)

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
                "autocast": bool(self.engine.torch_autocast_enabled()),
                "scale": self.recipe.step.scale,
                "epoch": self.steps_done / self.steps_per_epoch,
                "versions": versions(),
                "teacher_sha256": self.teacher.sha256 if self.teacher else None,
            },
            write=self.ranks.first,
        )
        self.ranks.wait_for_all()
        self.watch.checkpoint(time.perf_counter() - began)

    def close(self) -> None:
        """Stop what runs beside training."""
        self.stream.close()
        self.watch.close()
        self.stop_request.close()

    @property
    def total_steps(self) -> int:
        return self.stream.plan.total_steps

    @property
    def last_step(self) -> int:
        """After which the run ends, or is to stop."""
        return min(self.total_steps, self.stop_at_step or self.total_steps)

    @property
    def steps_per_epoch(self) -> int:
        return self.stream.plan.steps_per_epoch

    def _agreed(self, checkpoint: Checkpoint | None) -> Checkpoint | None:
        """Every rank must go on from the same step: the run directory has to be shared."""
        mine = torch.tensor(checkpoint.step if checkpoint else 0, device=self.ranks.device)
        found = [int(step) for step in self.ranks.gather(mine)]
        if len(set(found)) > 1:
            steps = ", ".join(f"rank {rank}: {step}" for rank, step in enumerate(found))
            raise RecipeError(
                f"ranks found different checkpoints in {self.run_dir} ({steps}): "
                f"put --output on storage that all hosts share"
            )
        return checkpoint

    def _make_step(self) -> tuple[KeyQueue | None, Step]:
        recipe, manifest = self.recipe, self.manifest
        queue, key_encoder = None, None
        if recipe.loss.contrast:
            queue = KeyQueue(recipe.queue.length, recipe.model.key_dim, self.ranks.device)
            key_encoder = make_key_encoder(self.engine, recipe, self.layout, self.ranks, self.total_steps)
        train_split, distill = recipe.data.train_split, recipe.loss.distill
        step = Step(
            self.engine,
            self.optimizer,
            make_loss(recipe.loss, manifest.split(train_split).class_counts, manifest.classes).to(self.ranks.device),
            self.layout,
            self.ranks,
            manifest.shots_of_classes(train_split),
            key_encoder,
            queue,
            stop_requested=self.stop_request,
            contrast_scope=recipe.loss.contrast_scope,
            experts=recipe.model.experts,
            steps_per_epoch=self.steps_per_epoch,
            mixup=Mixup(recipe.step.mixup, recipe.seed) if recipe.step.mixup else None,
            distillation=Distillation(distill, self.teacher) if distill and self.teacher else None,
        )
        return queue, step

    def _announce(self) -> None:
        recipe, layout = self.recipe, self.layout
        self.watch.say(
            f"{recipe.name}: {recipe.loss.method} with {recipe.model.backbone} on "
            f"{self.manifest.split(recipe.data.train_split).samples} images of {len(self.manifest.classes)} classes; "
            f"{self.ranks.world_size} ranks on {self.ranks.device.type}, ZeRO stage {stage_of(self.engine)}; "
            f"a step is {layout.micro_batches} micro-batches of {layout.micro_batch} ({layout.accumulation} a rank)"
        )
        if recipe.step.scale != 1:
            self.watch.say(
                f"scaled: {layout.micro_batches} micro-batches a step where the recipe has "
                f"{recipe.step.reference_micro_batches}, so the peak learning rate is {recipe.lr:g}"
            )
            if recipe.loss.contrast and recipe.queue.length < 4 * layout.global_batch:
                self.watch.say(
                    f"queue.length {recipe.queue.length} is under four global batches; consider "
                    f"--set queue.length={4 * layout.global_batch}"
                )
        if self.steps_done:
            self.watch.say(f"goes on from the checkpoint of step {self.steps_done} of {self.total_steps}")

    def _images_of(self, step: int) -> _StepImages:
        """The next of the stream, which are those of this step."""
        began = time.perf_counter()
        micro_batches = next(self.stream)
        self._waited += time.perf_counter() - began
        return _StepImages(micro_batches, self.step.begin_exchange(step, micro_batches))

    def _looks_ahead(self, done: int) -> bool:
        """Whether to ask for the images of the step after so many. Not where an epoch or the run ends, or a checkpoint
        is due: what cannot be read then must not take with it what was trained before."""
        key_encoder = self.step.key_encoder
        if key_encoder is None or not key_encoder.exchanges:
            return False
        at_epoch_end = done % self.steps_per_epoch == 0
        return done < self.last_step and not at_epoch_end and not self._checkpoint_due(done)

    def _after_epoch(self) -> None:
        self.bad_samples.begin_epoch()
        settings, epoch = self.recipe.evaluation, self.steps_done // self.steps_per_epoch
        due = self.steps_done == self.total_steps or (settings.every_epochs and epoch % settings.every_epochs == 0)
        if settings.split and due:
            accuracy = self.evaluate(settings.split)
            self.watch.evaluation(self.steps_done, epoch, settings.split, accuracy)
            self.watch.say(f"epoch {epoch}, {settings.split}: {_one_line(accuracy)}")
            self._keep_if_best(accuracy)

    def _keep_if_best(self, accuracy: ShotAccuracy) -> None:
        criterion = self.recipe.evaluation.checkpoint
        if criterion == "last":
            return
        assert accuracy.detail is not None
        score = accuracy.all if criterion == "best_all" else accuracy.detail.balanced
        if score is not None and score > self.best_score:
            self.best_score = score
            autocast = bool(self.engine.torch_autocast_enabled())
            self.checkpoints.save_best(
                self.steps_done, whole_model(self.engine), {"score": score, "autocast": autocast}, self.ranks.first
            )
            self.ranks.wait_for_all()

    def _abort_after_repeated_skips(self, result: StepResult) -> None:
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
        if self.skipped_in_a_row >= self.recipe.engine.max_skipped:
            raise TrainingError(
                f"{self.skipped_in_a_row} steps in a row changed nothing, the last since its {result.skipped} was not "
                f"finite: the weights are past mending. Go on from an older checkpoint in "
                f"{self.checkpoints.folder} (move later ones away) with a lower optimizer.lr or optimizer.clip_norm"
            )

    def _checkpoint_due(self, done: int) -> bool:
        settings = self.recipe.checkpoint
        if settings.every_steps and done % settings.every_steps == 0:
            return True
        return done % (self.steps_per_epoch * settings.every_epochs) == 0

    def _finish(self) -> ShotAccuracy:
        split, step = self.recipe.evaluation.test_split, self.steps_done
        best = self.checkpoints.best(until=step)
        if best is None:
            accuracy = self.evaluate(split)
        else:
            step = best.step
            self.watch.say(f"{split} is given the weights of step {step}, the best on {self.recipe.evaluation.split}")
            accuracy = self._evaluate_checkpoint(best, split)
        self.watch.metrics.observe_accuracy(accuracy)
        if self.ranks.first:
            write_results(
                self.run_dir / "metrics.json",
                accuracy,
                self.recipe,
                self.manifest,
                split=split,
                step=step,
                world_size=self.ranks.world_size,
                started=self.started,
            )
            self.watch.progress.close()
            self.watch.say(accuracy.table(f"{self.recipe.name} on {split}"))
            self.watch.say(f"report: {write_report(self.run_dir)}")
        return accuracy


def _splits(recipe: Recipe) -> set[str]:
    settings = recipe.evaluation
    return {recipe.data.train_split, settings.test_split, *([settings.split] if settings.split else [])}


def _one_line(accuracy: ShotAccuracy) -> str:
    shots: Iterator[str] = (
        f"{name} {100 * value:.1f}" if value is not None else f"{name} -" for name, value in accuracy.top1().items()
    )
    experts = [] if accuracy.experts_used is None else [f"experts {accuracy.experts_used:.2f}"]
    return "  ".join([*shots, *experts])

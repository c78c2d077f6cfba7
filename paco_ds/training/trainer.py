"""A training run from its first step, or from its last checkpoint, to its report.

`Trainer.run` is the story; what it calls lives in the components.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from paco_ds.checkpoint import Checkpoint, Checkpoints, resume_hint, same_on_all_ranks
from paco_ds.config.engine import described
from paco_ds.config.parse import one_line
from paco_ds.config.recipe import Recipe
from paco_ds.data.manifest import open_data
from paco_ds.data.shard import ShardReader
from paco_ds.distributed.folder_lock import FolderLock
from paco_ds.distributed.heartbeat import Heartbeat
from paco_ds.distributed.parts import Parts
from paco_ds.distributed.ranks import MicroBatchLayout, Ranks, SharedFlag
from paco_ds.distributed.zero import own_model, own_states, set_states, stage_of
from paco_ds.errors import NotFiniteError, UserError
from paco_ds.evaluation.accuracy import ShotAccuracy
from paco_ds.evaluation.results import about_process, now, versions, write_results
from paco_ds.evaluation.runner import EvaluationLeftError, evaluate, load_recogniser
from paco_ds.evaluation.split import EvaluationSplit
from paco_ds.files import replace_text, storage_errors
from paco_ds.metrics.exporter import Exporter
from paco_ds.metrics.run_logger import BadSamples, RunLogger
from paco_ds.models.families import ImageSizes
from paco_ds.models.recogniser import Recogniser
from paco_ds.models.weight_names import frozen_weights, source_of
from paco_ds.report.history import History
from paco_ds.report.run_report import write_report
from paco_ds.training.agreement import check_replicas_equal, check_same_run
from paco_ds.training.build import Classes, build_model, build_step, build_stream
from paco_ds.training.engine import PlanStage, choose_on_ranks, read_deepspeed_config
from paco_ds.training.images_ahead import ImagesAhead
from paco_ds.training.initial_centers import load_initial_centers
from paco_ds.training.initial_weights import load_initial_weights
from paco_ds.training.opening import STARTED_FROM, Opening
from paco_ds.training.optimizer import UsualNorm, learning_rate
from paco_ds.training.replay import keep_step
from paco_ds.training.saver import Saver
from paco_ds.training.step_result import StepResult, skip_reason
from paco_ds.training.stop_request import StopRequest
from paco_ds.training.taken_step import TakenStep, step_record
from paco_ds.training.teacher import Teacher
from paco_ds.training.timetable import Timetable
from paco_ds.training.weight_mapping import Fit

logger = logging.getLogger(__name__)


class Trainer:
    """One run of a recipe in a run directory, on this rank.

    Args:
        run: the run directory, shared by all ranks; a run found there is resumed.
        stop_at_step: write a checkpoint after this many steps and end, as if asked to stop.
        stop_request: of this process, by default one that begins here.
        lock: of the run directory, checked before each save on the rank that has it, see `sole_writer`.
        heartbeat: marked at each progress.
        metrics: receives the figures of the run; by default nothing does.
        plan_stage: decides `engine.deepspeed: auto` on CUDA, see `choose_on_ranks`.

    Raises:
        UserError: recipe, shards or checkpoint do not fit each other.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: Path,
        ranks: Ranks,
        stop_at_step: int | None = None,
        stop_request: StopRequest | None = None,
        lock: FolderLock | None = None,
        heartbeat: Heartbeat | None = None,
        metrics: Exporter | None = None,
        plan_stage: PlanStage | None = None,
    ) -> None:
        self.run_dir, self.ranks, self.lock = run, ranks, lock
        self.saver, self.started = Saver(), now()
        self.heartbeat = heartbeat or Heartbeat()
        self.heartbeat.mark("start", 0, slow=True)
        splits = (recipe.data.train_split, recipe.evaluation.split, recipe.evaluation.test_split)
        self.manifest = open_data(recipe.data, set(filter(None, splits)))
        check_same_run(recipe.resume_identity(), self.manifest.sha256, ranks)
        self.layout = MicroBatchLayout(recipe.step.micro_batch, recipe.step.micro_batches, ranks.rank, ranks.world_size)
        self.checkpoints = Checkpoints(run, recipe, self.manifest.sha256, self.saver, Parts(ranks).whole)
        checkpoint = same_on_all_ranks(self.checkpoints.latest(), run, ranks)
        resumed = checkpoint if checkpoint and checkpoint.step else None  # an imported one was not trained here
        trained_with = resumed.state.get("autocast") if resumed else None
        self.chosen = choose_on_ranks(recipe.engine, ranks, trained_with, plan_stage, recipe.optimizer)
        self.recipe = recipe.model_copy(update={"engine": self.chosen.settings})
        config = read_deepspeed_config(self.recipe.engine.deepspeed)

        self.steps_done = self.first_step = checkpoint.step if checkpoint else 0
        best = same_on_all_ranks(self.checkpoints.best(until=self.steps_done), run, ranks)
        self.best_score = best.state["score"] if best else -1.0
        self.skipped_in_a_row = 0
        self._taken: TakenStep | None = None
        # a CPU has done the step when it returns: there is nobody to keep busy
        self.reads_late = ranks.device.type != "cpu"
        distill = recipe.loss.distill
        self.teacher = None if distill is None else Teacher(distill, self.manifest, ranks.device)
        if resumed and self.teacher:
            self.teacher.check_taught(resumed)
        self.stop_request, self.stop_agreed = stop_request or StopRequest(), False
        # loader processes start here, before DeepSpeed and metrics start threads
        self.stream = build_stream(self.recipe, self.manifest, self.layout, self.steps_done, ranks.device)
        plan = self.stream.plan
        self.timetable = Timetable(
            plan.total_steps, plan.steps_per_epoch, stop_at_step, recipe.checkpoint, recipe.evaluation
        )
        classes = Classes.of(self.manifest, recipe.data.train_split)
        model = build_model(self.recipe, classes)
        self.started_from = self._load_weights(model, checkpoint)
        self.step = build_step(
            self.recipe,
            model,
            classes,
            config,
            ranks,
            total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
            teacher=self.teacher,
            stop_requested=lambda: self.stop_request() or self.saver.failed,
        )
        self.engine = self.step.engine
        self.queue = self.step.contrast.queue if self.step.contrast else None
        if checkpoint:
            self._restore_states(checkpoint)
        self.images = ImagesAhead(self.stream, self.step.begin_exchange, self._looks_ahead, start=self.steps_done)
        if ranks.first:
            self._write_run_files(recipe.to_yaml())
        self.logger = self._open_log(metrics or Exporter(), checkpoint)
        self.history = History(run / "metrics.jsonl")
        self.bad_samples = BadSamples(
            self.logger, recipe.data, ranks, planned=self.steps_per_epoch * self.layout.global_batch
        )

    def _load_weights(self, model: Recogniser, checkpoint: Checkpoint | None) -> Fit | None:
        """Put those of the checkpoint, or those to begin with, into the model, before DeepSpeed partitions it. Returns
        what `model.start_from` filled, see `load_initial_weights`."""
        started_from = None
        if checkpoint:
            checkpoint.load_into(model)
        else:
            started_from = load_initial_weights(model, self.recipe.model, ImageSizes.of(self.recipe.views))
            self._start_centers(model)
            if model.average is not None:
                model.begin_average()
        frozen = frozen_weights(model)
        if self.ranks.first:
            self.checkpoints.keep_frozen(frozen)
        self._is_frozen = partial(_is_or_follows, frozenset(frozen))
        return started_from

    def _start_centers(self, model: Recogniser) -> None:
        """Where `model.centers_from` says."""
        recipe = self.recipe
        if recipe.model.centers_from is None:
            return
        settings = recipe.evaluation.model_copy(update={"max_bad_share": recipe.data.max_bad_share})
        images = replace(self._evaluation_split(recipe.data.train_split), settings=settings)
        mark = partial(self.heartbeat.mark, "start", 0, slow=True)
        load_initial_centers(model, recipe.model.centers_from, images, self.ranks, mark)

    def _restore_states(self, checkpoint: Checkpoint) -> None:
        """Of the optimizer, of the gradient norms that were usual, and of the queue."""
        self.step.usual_norm = UsualNorm(**checkpoint.state.get("usual_norm", {}), device=self.ranks.device)
        set_states(self.engine, checkpoint.optimizer())
        if self.queue is not None:
            self.queue.load_state_dict(checkpoint.queue())

    def _write_run_files(self, as_given: str) -> None:
        """The recipe, in which `auto` stays for a continuation on other hardware; what `model.start_from` filled."""
        with storage_errors(self.run_dir):
            self.run_dir.mkdir(parents=True, exist_ok=True)
        replace_text(self.run_dir / "recipe.yaml", as_given)  # a second stage may be reading it
        if self.started_from is not None:
            replace_text(self.run_dir / STARTED_FROM, json.dumps(self.started_from.lists(), indent=1) + "\n")

    def _open_log(self, metrics: Exporter, checkpoint: Checkpoint | None) -> RunLogger:
        """The log of the run, cut after the checkpoint, with a line of this start."""
        run_logger = RunLogger(
            self.recipe.metrics,
            self.run_dir,
            self.ranks,
            metrics,
            epochs=self.recipe.schedule.epochs,
            total_steps=self.total_steps,
            steps_done=self.steps_done,
            window=checkpoint.state.get("log_window") if checkpoint else None,
        )
        if self.ranks.first:
            if checkpoint:
                run_logger.checkpoint_saved(checkpoint.path)
            run_logger.log.start(
                self.steps_done, about_process() | {"execution": self._execution, "world_size": self.ranks.world_size}
            )
        return run_logger

    def run(self) -> ShotAccuracy | None:
        """Train to the end, evaluate, report. None if the run was stopped before its end."""
        self.stop_request.begin()
        self._announce()
        try:
            return self._run()
        except EvaluationLeftError:  # the step's checkpoint was saved before
            self.stop_agreed = True
            self._wait_until_saved()
            self._draw_page()
            self.logger.say(
                f"stopped in an evaluation after step {self.steps_done} of {self.total_steps}; "
                f"the same command resumes from here"
            )
            return None

    def _run(self) -> ShotAccuracy | None:
        self._evaluate_if_missed()
        last_step = self.timetable.last_step
        while self.steps_done < last_step and not self.stop_agreed:
            self.train_step()
            if self._must_read_now():
                self.read_figures()
            # before the evaluation: nothing that it meets costs the epoch. While steps are skipped nothing changes, and
            # the checkpoints from before the trouble are kept
            due = self.timetable.checkpoint_due(self.steps_done) and not self.skipped_in_a_row
            if due or self.stop_agreed or self.steps_done == last_step:
                self.save()
            if self.timetable.ends_epoch(self.steps_done) and not self._stops_early:
                self._after_epoch()
        self._wait_until_saved()
        if self.steps_done < self.total_steps:
            self.images.drain()
            self.logger.log.end_window()
            self._draw_page()
            self.logger.say(
                f"stopped after step {self.steps_done} of {self.total_steps}; the same command resumes from here"
            )
            return None
        return self._finish()

    def _must_read_now(self) -> bool:
        """Whether the figures of the last step are read at once: where no device works beside the host, or something
        follows that must know of every step: a checkpoint, an evaluation, the end; or a step that, if skipped too,
        ends the run and is kept with the state that it met."""
        last_skip = self.skipped_in_a_row + 1 >= self.recipe.engine.max_skipped
        goes_on = self.timetable.next_step_follows(self.steps_done) and not self.stop_agreed
        return not self.reads_late or last_skip or not goes_on

    def train_step(self) -> StepResult:
        """One optimizer step: wait for its images and take it; then read the figures of the one before, so that the
        device has work while the host logs them."""
        began = time.perf_counter()
        number = self.steps_done
        compiles = number == self.first_step
        self.heartbeat.mark("images", number + 1, slow=compiles)
        images = next(self.images)
        self.heartbeat.mark("training", number + 1, slow=compiles)
        lr = learning_rate(self.recipe.schedule, self.recipe.lr, number, self.steps_per_epoch)
        result = self.step(number, images.micro_batches, lr, images.keys)
        self.steps_done += 1
        if self._taken is not None:
            self._log(self._taken)
        seconds = time.perf_counter() - began
        self._taken = TakenStep(number, lr, seconds, images.waited, images.micro_batches, result)
        every = self.recipe.engine.digest_every
        if every and self.steps_done % every == 0:
            self.read_figures()  # ranks that differ end the run: its last step is in the log
            check_replicas_equal(self.engine.module, self.queue, self.ranks)
        return result

    def read_figures(self) -> None:
        """Wait for the step taken last, and log it, unless that is done."""
        taken, self._taken = self._taken, None
        if taken is not None:
            began = time.perf_counter()
            taken.result.wait()
            self._log(replace(taken, seconds=taken.seconds + time.perf_counter() - began))

    def _log(self, taken: TakenStep) -> None:
        """The figures of a step into log and metrics, and what follows from them."""
        result = taken.result
        self.stop_agreed = self.stop_agreed or result.stop
        record = step_record(taken, self.timetable.epoch(taken.number), self.layout.global_batch)
        self.logger.step(record, self.layout.accumulation * self.layout.micro_batch, skip_reason(result))
        mine = ((r.key, r.shard, r.reason) for batch in taken.micro_batches for r in batch.replaced)
        self.bad_samples.add(mine, on_all_ranks=result.replaced)
        self._abort_after_repeated_skips(taken)

    def evaluate(self, split: str) -> ShotAccuracy:
        """Accuracy of the present weights, those of `evaluation.weights`."""
        experts, model = self.recipe.model.experts, self.engine.module
        with model.evaluating(self.recipe.evaluation.weights):
            return evaluate(self.engine, model, self._evaluation_split(split), self.ranks, experts, self._leave())

    def _leave(self) -> Callable[[], bool]:
        """To be asked before each batch of an evaluation: whether to leave it. Marks its progress."""
        requested, batches = SharedFlag(self.ranks, self.stop_request), itertools.count()
        self.heartbeat.mark("evaluation", self.steps_done, slow=True)

        def leave() -> bool:
            compiles = next(batches) == 0
            self.heartbeat.mark("evaluation", self.steps_done, slow=compiles)
            return requested()

        return leave

    def _evaluation_split(self, split: str) -> EvaluationSplit:
        recipe = self.recipe
        return EvaluationSplit(self.manifest, split, recipe.data, recipe.views.evaluation, recipe.evaluation)

    def _evaluate_checkpoint(self, checkpoint: Checkpoint, split: str) -> ShotAccuracy:
        """Accuracy of saved weights, in the precision they were trained with."""
        device, experts, leave = self.ranks.device, self.recipe.model.experts, self._leave()
        model = load_recogniser(checkpoint, self.recipe, self.manifest).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=checkpoint.state["autocast"]):
            return evaluate(model, model, self._evaluation_split(split), self.ranks, experts, leave)

    @property
    def _execution(self) -> dict[str, Any]:
        return described(self.recipe.engine, stage_of(self.engine))

    @property
    def _autocast(self) -> bool:
        """Whether it is trained under bfloat16 autocast."""
        return bool(self.engine.torch_autocast_enabled())

    @property
    def _trained_data(self) -> dict[str, Any]:
        return self.manifest.trained_data(self.recipe.data.train_split).state()

    def save(self) -> None:
        """Copy all that a checkpoint holds; it is written while training goes on."""
        began = time.perf_counter()
        self._wait_until_saved()
        self.checkpoints.save(
            self.steps_done,
            own_model(self.engine, self._is_frozen),
            own_states(self.engine),
            self.queue.state_dict() if self.queue is not None else None,
            about={
                "world_size": self.ranks.world_size,
                "zero_stage": stage_of(self.engine),
                "autocast": self._autocast,
                "scale": self.recipe.step.scale,
                "usual_norm": self.step.usual_norm.state(),
                "log_window": self.logger.log.window(),
                "epoch": self.steps_done / self.steps_per_epoch,
                "versions": versions(),
                "teacher_sha256": self.teacher.sha256 if self.teacher else None,
                "data": self._trained_data,
            },
            write=self.ranks.first,
            epoch_steps=self.steps_per_epoch,
            saved=self.logger.checkpoint_saved,
        )
        self.logger.checkpoint(self.steps_done, time.perf_counter() - began)

    def _wait_until_saved(self) -> None:
        """Wait for the save under way.

        Raises:
            UserError: on every rank, what it raised, or that the run directory is another job's by now.
        """
        self.heartbeat.mark("save", self.steps_done, slow=True)
        failure = None
        try:
            self.saver.wait()
            if self.lock is not None:
                self.lock.check()
        except UserError as error:
            failure = error
        if failure := self.ranks.gather_objects(failure)[0]:
            raise failure

    def close(self) -> None:
        """Stop what runs beside training."""
        self.saver.close()
        self.stream.close()
        self.logger.close()
        self.stop_request.close()

    @property
    def total_steps(self) -> int:
        return self.timetable.total_steps

    @property
    def steps_per_epoch(self) -> int:
        return self.timetable.steps_per_epoch

    @property
    def _stops_early(self) -> bool:
        """Asked to stop before the end; an evaluation that is due then is made up for by the resumed run."""
        return self.stop_agreed and self.steps_done < self.total_steps

    def _announce(self) -> None:
        key_encoder = self.step.contrast.key_encoder if self.step.contrast else None
        opening = Opening(
            self.recipe,
            self.run_dir,
            images=self.manifest.split(self.recipe.data.train_split).samples,
            classes=len(self.manifest.classes),
            layout=self.layout,
            device=self.ranks.device.type,
            zero_stage=stage_of(self.engine),
            why_stage=self.chosen.why_stage,
            total_steps=self.total_steps,
            keys_normalised=key_encoder.batch_norm if key_encoder else None,
            started_from=self.started_from,
        )
        for line in opening.lines():
            self.logger.say(line)
        for key, (before, lowered) in self.checkpoints.lowered.items():
            self.logger.changed_setting(self.steps_done, key, before, lowered)
        if (changed := self.chosen.changed_precision) is not None:
            self.logger.changed_setting(self.steps_done, "engine.precision", *changed)
        for note in self.chosen.notes:
            self.logger.say(note)
        if self.steps_done:
            self.logger.say(f"resumes from the checkpoint of step {self.steps_done} of {self.total_steps}")

    def _looks_ahead(self, done: int) -> bool:
        """Whether to ask for the images of the step after so many, so that its key images are already on their way."""
        contrast = self.step.contrast
        exchanges = contrast is not None and contrast.key_encoder is not None and contrast.key_encoder.exchanges
        return exchanges and self.timetable.next_step_follows(done)

    def _after_epoch(self) -> None:
        self.bad_samples.begin_epoch()
        if self.timetable.evaluation_due(self.steps_done):
            self._evaluate_epoch()

    def _evaluate_epoch(self) -> None:
        split, epoch = self.recipe.evaluation.split, self.timetable.epoch(self.steps_done)
        assert split is not None
        began = time.perf_counter()
        accuracy = self.evaluate(split)
        self.logger.evaluation(self.steps_done, epoch, split, accuracy, time.perf_counter() - began)
        self.logger.say(f"epoch {epoch}, {split}: {accuracy.one_line()}")
        assert accuracy.detail is not None
        self._keep_if_best({"best_all": accuracy.all, "best_balanced": accuracy.detail.balanced})
        self._draw_page()

    def _draw_page(self) -> Path | None:
        """Write RUN/report.html on the first rank; an error is a warning, since a page is not worth a training. All
        ranks call it, whose marks are alike."""
        self.heartbeat.mark("report", self.steps_done, slow=True)
        if not self.ranks.first:
            return None
        try:
            return write_report(self.run_dir, self.history)
        except Exception as error:
            logger.warning("%s cannot be drawn, training goes on: %s", self.run_dir / "report.html", one_line(error))
            return None

    def _evaluate_if_missed(self) -> None:
        """Of a run that ended between the checkpoint at the end of an epoch and its evaluation, or the best weights."""
        if not self.timetable.evaluation_due(self.steps_done):
            return
        logged = self.ranks.gather_objects(self.logger.log.evaluation_of(self.steps_done))[0]
        if logged is None:
            self._evaluate_epoch()
        else:
            self._keep_if_best({"best_all": logged.get("all"), "best_balanced": logged.get("balanced")})

    def _keep_if_best(self, scores: Mapping[str, float | None]) -> None:
        """Keep the present weights if their score by the recipe's criterion is the best so far."""
        score = scores.get(self.recipe.evaluation.checkpoint)
        if score is not None and score > self.best_score:
            self._wait_until_saved()
            self.best_score = score
            self.heartbeat.mark("save", self.steps_done, slow=True)
            about = {"score": score, "autocast": self._autocast, "data": self._trained_data}
            weights = own_model(self.engine, self._is_frozen)
            self.checkpoints.save_best(self.steps_done, weights, about, self.ranks.first)

    def _abort_after_repeated_skips(self, taken: TakenStep) -> None:
        result = taken.result
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if result.skipped else 0
        if self.skipped_in_a_row < self.recipe.engine.max_skipped:
            return
        kept = self.run_dir / f"skipped-step-{taken.number + 1:08d}"
        reason, recipe = skip_reason(result), self.recipe
        with ShardReader(self.manifest.storage, self.manifest.split(recipe.data.train_split)) as reader:
            keep_step(
                kept,
                self.step,
                taken.micro_batches,
                self.ranks,
                recipe=recipe.to_yaml(),
                reader=reader,
                about={
                    "step": taken.number,
                    "reason": reason,
                    "lr": taken.lr,
                    "steps_per_epoch": self.steps_per_epoch,
                    "total_steps": self.total_steps,
                    "world_size": self.ranks.world_size,
                },
            )
        raise NotFiniteError(
            f"{self.skipped_in_a_row} steps in a row were skipped, the last: {reason}. It is kept in {kept}: "
            f"paco-train --replay {kept} says where it begins. {resume_hint(self.run_dir)}, with a lower optimizer.lr "
            f"or optimizer.clip_norm (which a resumed run may have); or move later checkpoints away"
        )

    def _finish(self) -> ShotAccuracy:
        split, step = self.recipe.evaluation.test_split, self.steps_done
        best = same_on_all_ranks(self.checkpoints.best(until=step), self.run_dir, self.ranks)
        if best is None:
            accuracy = self.evaluate(split)
        else:
            step = best.step
            self.logger.say(f"{split} is given the weights of step {step}, the best on {self.recipe.evaluation.split}")
            accuracy = self._evaluate_checkpoint(best, split)
        self.heartbeat.mark("report", self.steps_done, slow=True)
        self.logger.metrics.observe_accuracy(accuracy, split)
        if self.ranks.first:
            write_results(
                self.run_dir / "metrics.json",
                accuracy,
                self._evaluation_split(split),
                run=self.recipe.name,
                seed=self.recipe.seed,
                scale=self.recipe.step.scale,
                step=step,
                world_size=self.ranks.world_size,
                started=self.started,
                about={"execution": self._execution, "weights": self.recipe.evaluation.weights},
            )
            self.logger.progress.close()
            self.logger.say(accuracy.table(f"{self.recipe.name} on {split}"))
        if page := self._draw_page():
            self.logger.say(f"report: {page}")
        self.logger.metrics.ended("finished")
        return accuracy


def _is_or_follows(frozen: frozenset[str], name: str) -> bool:
    """Whether a weight, or what a moving average follows with it, is one of these."""
    return source_of(name) in frozen

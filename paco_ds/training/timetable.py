"""After which steps of a run something is due: the end of an epoch, a checkpoint, an evaluation, the end of the run."""

from __future__ import annotations

from dataclasses import dataclass

from paco_ds.config.recipe import CheckpointSettings, EvaluationSettings


@dataclass(frozen=True)
class Timetable:
    """What is due after which step. Its methods take the number of steps done: 1 after the first step.

    Attributes:
        total_steps: of the recipe; the last one ends an epoch.
        steps_per_epoch: the same in every epoch.
        stop_at_step: the run is to stop after this many steps; None: only at its end.
    """

    total_steps: int
    steps_per_epoch: int
    stop_at_step: int | None
    checkpoint: CheckpointSettings
    evaluation: EvaluationSettings

    @property
    def last_step(self) -> int:
        """Steps after which the run ends, or is to stop."""
        return min(self.total_steps, self.stop_at_step or self.total_steps)

    def epoch(self, done: int) -> int:
        """Epochs that are over; also the epoch, from 0, of the step that comes next."""
        return done // self.steps_per_epoch

    def ends_epoch(self, done: int) -> bool:
        """Whether the last step done was the last of an epoch."""
        return done > 0 and done % self.steps_per_epoch == 0

    def checkpoint_due(self, done: int) -> bool:
        """Whether a checkpoint is due by `checkpoint.every_steps` or `checkpoint.every_epochs`. (One is also written
        where a run stops.)"""
        settings = self.checkpoint
        if settings.every_steps and done % settings.every_steps == 0:
            return True
        return self.ends_epoch(done) and self.epoch(done) % settings.every_epochs == 0

    def evaluation_due(self, done: int) -> bool:
        """Whether the validation split is evaluated: at the end of an epoch by `evaluation.every_epochs`, and at the
        end of the run; never without such a split."""
        settings = self.evaluation
        if not settings.split or not self.ends_epoch(done):
            return False
        regular = settings.every_epochs > 0 and self.epoch(done) % settings.every_epochs == 0
        return regular or done == self.total_steps

    def next_step_follows(self, done: int) -> bool:
        """Whether the next step follows at once, so that its images may be asked for before this one has ended. Not at
        the end of an epoch or of the run, or before a checkpoint: a read error in the next step must not prevent this
        checkpoint."""
        return done < self.last_step and not self.ends_epoch(done) and not self.checkpoint_due(done)

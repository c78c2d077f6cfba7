"""What a run says before its first step: what is trained on what, and where a setting is not what one might expect."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from paco_ds.config.engine import described, in_words
from paco_ds.config.recipe import Recipe
from paco_ds.contrast.key_queue import short_queue_hint
from paco_ds.distributed.ranks import MicroBatchLayout
from paco_ds.training.weight_mapping import Fit

STARTED_FROM = "started_from.json"
"""File of a run directory: what became of the tensors of `model.start_from`."""


@dataclass(frozen=True)
class Opening:
    """What is known of a run before its first step.

    Attributes:
        recipe: as it runs, nothing of its engine left to `auto`.
        run: the run directory.
        images, classes: their numbers in the training split.
        device: type of the ranks' devices, such as "cuda".
        zero_stage, why_stage: of DeepSpeed, and what decided it.
        keys_normalised: over which groups, see `key_encoder.batch_norm`; None without a key encoder.
        started_from: what `model.start_from` filled; None without it, and in a resumed run.
    """

    recipe: Recipe
    run: Path
    images: int
    classes: int
    layout: MicroBatchLayout
    device: str
    zero_stage: int
    why_stage: str
    total_steps: int
    keys_normalised: Literal["shuffle", "local"] | None = None
    started_from: Fit | None = None

    def lines(self) -> list[str]:
        """One by one what is said; the first has several lines."""
        return [self._summary(), *self._key_encoder(), *self._initial_weights(), *self._learning_rate()]

    def _summary(self) -> str:
        recipe, layout = self.recipe, self.layout
        return (
            f"{recipe.name}: {recipe.loss.method} with {recipe.model.backbone}, into {self.run}\n"
            f"  data       {self.images} images of {self.classes} classes, {recipe.data.shards}\n"
            f"  ranks      {layout.world_size} on {self.device}, ZeRO stage {self.zero_stage} ({self.why_stage})\n"
            f"  step       {layout.micro_batches} micro-batches of {layout.micro_batch} "
            f"({layout.accumulation} a rank)\n"
            f"  length     {self.total_steps} steps in {recipe.schedule.epochs} epochs\n"
            f"  precision  {in_words(described(recipe.engine, self.zero_stage))}"
        )

    def _key_encoder(self) -> list[str]:
        settings, groups = self.recipe.key_encoder, self.keys_normalised
        if settings is None or groups is None or settings.batch_norm != "auto":
            return []
        has = "has" if groups == "shuffle" else "has no"
        return [f"key_encoder.batch_norm auto: {groups}, the key encoder {has} BatchNorm"]

    def _initial_weights(self) -> list[str]:
        if self.started_from is None:
            return []
        taken = self.started_from.in_words()
        return [f"starts from {self.recipe.model.start_from}: {taken}; all names: {self.run / STARTED_FROM}"]

    def _learning_rate(self) -> list[str]:
        """Where it, or the number of micro-batches, is not the recipe's own."""
        recipe, images, lines = self.recipe, self.layout.global_batch, []
        if recipe.optimizer.lr_per_256:
            lines += [
                f"peak learning rate {recipe.lr:g}: {recipe.optimizer.lr:g} for 256 images, and a step has {images}"
            ]
        if recipe.step.scale != 1:
            lines += [
                f"scaled: {recipe.step.micro_batches} micro-batches a step where the recipe has "
                f"{recipe.step.reference_micro_batches}, so the peak learning rate is {recipe.lr:g} "
                f"(step.lr_scaling {recipe.step.lr_scaling})"
            ]
            if recipe.keys_from and (hint := short_queue_hint(recipe.queue.length, images)):
                lines += [hint]
        return lines

"""The teacher of a distillation: a finished run, frozen, outside the DeepSpeed engine and equal on every rank."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from paco_ds.checkpoint import MODEL, Checkpoint, open_run
from paco_ds.config.loss import DistillSettings
from paco_ds.data.manifest import Manifest
from paco_ds.errors import CheckpointError, RecipeError
from paco_ds.evaluation.runner import Ensemble, load_recogniser


class Teacher:
    """Images to the logits [B, C] that a run would be evaluated by, in the precision it was trained with.

    Args:
        settings: name its run directory, of which recipe and safetensors are read.
        manifest: of the student's shards.

    Attributes:
        sha256: of its weights.

    Raises:
        RecipeError: no such run, or one of other shards, whose classes may be others.
    """

    def __init__(self, settings: DistillSettings, manifest: Manifest, device: torch.device) -> None:
        run = Path(settings.teacher)
        remedy = "name the folder where it is, or set loss.distill to null"
        recipe, checkpoint = open_run(run, "loss.distill.teacher", remedy)
        try:
            checkpoint.check_data(manifest.sha256)
        except CheckpointError as error:
            raise RecipeError(
                f"loss.distill.teacher {run} was trained on other shards than data.shards, with classes that may be "
                f"others or in another order: train a teacher on these shards"
            ) from error
        self.sha256: str = checkpoint.state["sha256"][MODEL]
        member = load_recogniser(checkpoint, recipe, manifest), checkpoint.state["autocast"]
        self._model = Ensemble([member]).requires_grad_(False).eval().to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        logits: Tensor = self._model(images).logits
        return logits

    def check_taught(self, student: Checkpoint) -> None:
        """Refuse to resume a run that began with another teacher.

        Raises:
            CheckpointError: the weights are others.
        """
        began = student.state.get("teacher_sha256")
        if began != self.sha256:
            raise CheckpointError(
                f"{student.path} was taught by other weights ({str(began)[:12]}, now {self.sha256[:12]}): let "
                f"loss.distill.teacher be the run that it began with, or give another --output"
            )

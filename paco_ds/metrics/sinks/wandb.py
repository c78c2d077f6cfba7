"""Weights & Biases, in RUN/wandb: offline unless WANDB_MODE says otherwise; `wandb sync` sends it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from paco_ds.metrics.sinks.base import remembered


class WandB:
    """One run of W&B; `step` is its axis, since W&B's own step never goes back as that of a resumed run does."""

    def __init__(self, run: Path) -> None:
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "paco_ds"),
            name=run.resolve().name,
            id=remembered(run / "wandb" / "run_id", lambda: uuid.uuid4().hex[:12]),
            resume="allow",
            dir=run,
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
            settings=wandb.Settings(silent=True, disable_git=True, save_code=False, console="off"),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log({"step": step, **figures})

    def close(self) -> None:
        self._run.finish()


def open_sink(run: Path, steps_done: int) -> WandB:
    """The sink of a run."""
    return WandB(run)

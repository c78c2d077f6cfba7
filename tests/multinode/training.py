"""A small training that lasts long enough to be disturbed, and what it logged."""

from __future__ import annotations

from pathlib import Path

from paco_ds.metrics.log import read
from tests.recipes import write_tiny_recipe

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "paco_ds" / "train.py"
EPOCHS, STEPS_PER_EPOCH, CHECKPOINT_EVERY = 15, 4, 20


def write_recipe(folder: Path, shards: Path, epochs: int = EPOCHS, stage: int = 1) -> Path:
    """The recipe of a job: a loader process a rank, checkpoints inside epochs, /metrics."""
    settings = {
        "data.shards": shards,
        "data.workers": 1,
        "engine.deepspeed": ROOT / "ds_configs" / f"zero{stage}.json",
        "schedule.epochs": epochs,
        "evaluation.every_epochs": 0,
        "checkpoint.every_steps": CHECKPOINT_EVERY,
        "checkpoint.every_epochs": epochs,
        "metrics.serve": True,
        "metrics.port": 19700,
    }
    write_tiny_recipe(folder / "recipe.yaml", *(f"{key}={value}" for key, value in settings.items()))
    return folder / "recipe.yaml"


def steps(run: Path) -> list[tuple[int, float, float, float]]:
    """(step, loss, lr, grad_norm) of every step of a run so far."""
    log = run / "metrics.jsonl"
    lines = [line for line in read(log) if line["kind"] == "step"] if log.exists() else []
    return [(line["step"], line["loss"], line["lr"], line["grad_norm"]) for line in lines]

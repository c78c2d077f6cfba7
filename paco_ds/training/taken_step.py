"""A step that was taken, and its record for log and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paco_ds.data.stream.batches import MicroBatch
from paco_ds.metrics.steps import StepRecord
from paco_ds.training.step_result import StepResult


@dataclass(frozen=True)
class TakenStep:
    """A step whose figures are still on the device.

    Attributes:
        number: of the step, from 0.
        lr: its learning rate.
        seconds: to take it, and to wait for the one before or, where nothing follows at once, for itself.
        waited: seconds of them that this rank waited for images.
        micro_batches: of this rank.
    """

    number: int
    lr: float
    seconds: float
    waited: float
    micro_batches: Sequence[MicroBatch]
    result: StepResult


def step_record(taken: TakenStep, epoch: int, global_batch: int) -> StepRecord:
    """The record of a taken step; waits for its figures.

    Args:
        epoch: of the step, from 0.
        global_batch: images of a step on all ranks.
    """
    result = taken.result
    return StepRecord(
        step=taken.number + 1,
        epoch=epoch,
        loss=result.loss,
        lr=taken.lr,
        grad_norm=result.grad_norm,
        grad_norm_ratio=result.grad_norm_ratio,
        images_per_second=global_batch / taken.seconds,
        data_wait_seconds=taken.waited,
        step_seconds=taken.seconds,
        queue_fill=result.queue_fill,
        center_probability=result.center_probability,
        center_probability_optimum=result.center_probability_optimum,
        positive_probability=result.positive_probability,
        positive_probability_optimum=result.positive_probability_optimum,
        parts=result.parts,
        skipped=result.skipped is not None,
        bad_samples=result.replaced,
    )

"""One optimizer step over M micro-batches, on any number of ranks that divides M.

1. The key encoder follows the query encoder (moving average).
2. Keys of the whole global batch, on every rank.
3. M query micro-batches, each contrasted with its own queries and keys and the queue before this step.
4. Running statistics: the mean over the M micro-batches.
5. If the update was applied, the queue takes the G keys.

With one encoder for both views (GPaCo) there is no 1 and 2: the rows of both views are anchors and contrasts, with
gradient, and those of the second views are gathered, without gradient, for the queue.

A step in which keys, a loss, running statistics or a gradient norm are not finite on any rank is skipped: weights,
momentum, statistics and queue stay as they were on every rank. So is one whose gradient norm is far off the usual,
where `engine.max_grad_norm_ratio` says so. Only the key encoder's moving average may have been updated, which is finite
whenever the weights are.

Ranks wait for each other twice: before the first loss for the keys, and for the gradients. Key images are exchanged
one step ahead (`images_ahead`). Sums of losses and of statistics are reduced during the last backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from paco_ds.contrast.contrast import Contrast
from paco_ds.contrast.key_encoder import PendingImages, PendingKeys, gather_keys
from paco_ds.data.manifest import SHOTS
from paco_ds.data.stream.batches import MicroBatch
from paco_ds.distributed.ranks import MicroBatchLayout, Ranks
from paco_ds.losses.base import Loss
from paco_ds.losses.distillation import PART
from paco_ds.training.batch_norm import RunningStatistics
from paco_ds.training.forward import Forward, ForwardResult
from paco_ds.training.mixup import Mixup
from paco_ds.training.optimizer import GuardedSGD, UsualNorm
from paco_ds.training.totals import StepTotals

OUTLIER = "outlier"
"""The reason of a step that is skipped for its gradient norm, which is finite."""


@dataclass(frozen=True)
class StepResult:
    """What a step did, the same on every rank.

    Attributes:
        loss: mean over the global batch; nan if the step was skipped before it was known.
        grad_norm: L2 norm before clipping; nan likewise.
        grad_norm_ratio: `grad_norm` over its usual value in recent steps; None in the first steps.
        skipped: why nothing was changed ("keys", "loss", "statistics" or "gradient" not finite, or `OUTLIER`), or None.
        center_probability, center_probability_optimum: mean over the anchors of each shot; None without any.
        positive_probability, positive_probability_optimum: the same over its anchors that have a positive.
        parts: terms of the loss by name, means over the global batch; nan like the loss.
        replaced: samples of this step, on all ranks, that could not be read.
        stop: some rank was asked to stop.
    """

    loss: float
    grad_norm: float
    grad_norm_ratio: float | None
    skipped: str | None
    center_probability: Mapping[str, float | None]
    center_probability_optimum: Mapping[str, float | None]
    positive_probability: Mapping[str, float | None]
    positive_probability_optimum: Mapping[str, float | None]
    parts: Mapping[str, float]
    replaced: int
    stop: bool


class Step:
    """One optimizer step of a model, callable with this rank's micro-batches.

    Args:
        engine: the DeepSpeed engine; its module is a `Recogniser`.
        forward: forward and loss of a micro-batch, through the engine.
        shots_of_classes: "many", "medium" or "few" for each class.
        contrast: keys and queue; None for methods without contrast.
        stop_requested: asked once a step; if any rank says True, all learn it from `StepResult.stop`.
        steps_per_epoch: required if the loss changes with the epoch.
        mixup: mixes the images of each micro-batch in pairs; for methods without contrast.
        max_grad_norm_ratio: a step whose gradient norm is more than so many times the usual one is skipped.

    Raises:
        ValueError: the loss changes with the epoch and `steps_per_epoch` is missing.
    """

    def __init__(
        self,
        engine: Any,
        optimizer: GuardedSGD,
        forward: Forward,
        layout: MicroBatchLayout,
        ranks: Ranks,
        shots_of_classes: Sequence[str],
        contrast: Contrast | None = None,
        *,
        stop_requested: Callable[[], bool] = lambda: False,
        steps_per_epoch: int | None = None,
        mixup: Mixup | None = None,
        max_grad_norm_ratio: float | None = None,
    ) -> None:
        loss = forward.loss
        assert isinstance(loss, Loss)
        if loss.changes_with_epoch and steps_per_epoch is None:
            raise ValueError("this loss changes from one epoch to the next: Step needs steps_per_epoch")
        self.engine, self.optimizer, self.forward = engine, optimizer, forward
        self.layout, self.ranks, self.contrast = layout, ranks, contrast
        self.steps_per_epoch, self.mixup, self.stop_requested = steps_per_epoch, mixup, stop_requested
        self.part_names, self._begin_epoch = loss.part_names, loss.begin_epoch
        if forward.distillation is not None:
            self.part_names = (*self.part_names, PART)
        self.statistics = RunningStatistics(engine.module)
        self.usual_norm = UsualNorm()
        if max_grad_norm_ratio is not None:
            optimizer.norm_guard = lambda: (self.usual_norm.ratio(self._grad_norm()) or 0.0) > max_grad_norm_ratio
        self._shots_C = torch.tensor([SHOTS.index(s) for s in shots_of_classes], device=ranks.device)

    def begin_exchange(self, step: int, micro_batches: Sequence[MicroBatch]) -> PendingImages | None:
        """Begin to send the key images of a step to the ranks that make their keys; None without a key encoder."""
        if self.contrast is None:
            return None
        return self.contrast.begin_exchange(step, [b.key for b in micro_batches if b.key is not None])

    def __call__(
        self, step: int, micro_batches: Sequence[MicroBatch], lr: float, key_images: PendingImages | None = None
    ) -> StepResult:
        """Run global step `step` (from 0) with this rank's A micro-batches, in the order of `layout.own`.

        Args:
            key_images: what `begin_exchange` gave for this step, on every rank; by default it is called now.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.skipped = False
        if self.steps_per_epoch is not None:
            self._begin_epoch(step // self.steps_per_epoch)
        replaced = sum(len(b.replaced) for b in micro_batches)
        totals = StepTotals(self.ranks.device, self.part_names, replaced, self.stop_requested())

        pending = self._make_keys(step, micro_batches, key_images)
        self.optimizer.guard = lambda: totals.not_finite() is not None or _not_finite(pending)
        newest = self._run_queries(step, micro_batches, pending, totals)
        skipped = self._skip_reason(totals, pending)
        keys = None if newest is None else newest.wait()  # of a skipped step too: no collective outlives its step
        if skipped:
            self.statistics.skip_step()
        else:
            self.statistics.finish_step(self.layout.micro_batches, step)
            if self.contrast is not None and keys is not None:
                self.contrast.queue.push(keys.keys_GD, keys.labels_G)
        result = self._result(totals, skipped, known=skipped != "keys")
        if not skipped:
            self.usual_norm.add(result.grad_norm)
        return result

    def _make_keys(
        self, step: int, micro_batches: Sequence[MicroBatch], images: PendingImages | None
    ) -> PendingKeys | None:
        if self.contrast is None:
            return None
        images = images or self.begin_exchange(step, micro_batches)
        return self.contrast.make_keys(step, images, [b.labels for b in micro_batches])

    def _run_queries(
        self, step: int, micro_batches: Sequence[MicroBatch], pending: PendingKeys | None, totals: StepTotals
    ) -> PendingKeys | None:
        """Forward and backward of every micro-batch, and the update. Returns the keys to push to the queue."""
        keys, snapshot, second_views = None, None, []
        self.statistics.begin_step()
        for j, micro_batch in zip(self.layout.own, micro_batches, strict=True):
            self.statistics.begin_micro_batch()
            result = self._forward(step, j, micro_batch)
            self.statistics.end_micro_batch()
            if micro_batch is micro_batches[0]:
                keys = None if pending is None else pending.wait()
                snapshot = None if self.contrast is None else self.contrast.snapshot(keys)
            own_keys = None if self.contrast is None else self.contrast.keys_of(j, keys, self.layout)
            output = self.forward.run_loss(result, own_keys, snapshot)
            totals.add(output, self._shots_C[result.labels])
            if self.forward.two_views:
                second_views.append(result.second_view_rows)
            if micro_batch is micro_batches[-1]:
                # reduced during the last backward, after which DeepSpeed reduces gradients and steps
                sums = self.statistics.sums()
                totals.add_statistics(sums)
                totals.begin_sum(self.ranks)
                self.statistics.begin_mean(sums, self.ranks)
                if second_views:
                    labels = torch.cat([b.labels for b in micro_batches])
                    pending = gather_keys(self.layout, self.ranks, torch.cat(second_views), labels)
            self.engine.backward(output.loss)
            self.engine.step()
        return pending

    def _forward(self, step: int, j: int, micro_batch: MicroBatch) -> ForwardResult:
        """The model's forward on micro-batch j, on the device."""
        device = self.ranks.device
        query, labels = (t.to(device, non_blocking=True) for t in (micro_batch.query, micro_batch.labels))
        key = None
        if self.forward.two_views and micro_batch.key is not None:
            key = micro_batch.key.to(device, non_blocking=True)
        mix = None if self.mixup is None else self.mixup.draw(step, j, len(labels))
        return self.forward.run_model(query, key, labels, mix)

    def _skip_reason(self, totals: StepTotals, pending: PendingKeys | None) -> str | None:
        # first, and always: the flags that ranks must agree on are in the same sum
        not_finite = totals.not_finite()
        if _not_finite(pending):
            return "keys"
        if not_finite:
            return not_finite
        if self.optimizer.skipped or not self.engine.was_step_applied():
            return OUTLIER if math.isfinite(self._grad_norm()) else "gradient"
        return None

    def _grad_norm(self) -> float:
        """The L2 norm before clipping of the last step, from the moment the optimizer is asked to step."""
        # the engine's own get_global_grad_norm has it only after the step
        norm = self.optimizer.grad_norm if self.optimizer.whole else self.engine.optimizer._global_grad_norm
        return float("nan") if norm is None else float(norm)

    def _result(self, totals: StepTotals, skipped: str | None, known: bool) -> StepResult:
        grad_norm = self._grad_norm() if skipped in (None, "gradient", OUTLIER) else float("nan")
        return StepResult(
            loss=totals.loss / self.layout.micro_batches if known else float("nan"),
            grad_norm=grad_norm,
            grad_norm_ratio=self.usual_norm.ratio(grad_norm),
            skipped=skipped,
            center_probability=totals.centers(0),
            center_probability_optimum=totals.centers(1),
            positive_probability=totals.positives(0),
            positive_probability_optimum=totals.positives(1),
            parts=totals.parts(self.layout.micro_batches) if known else dict.fromkeys(self.part_names, float("nan")),
            replaced=totals.replaced,
            stop=totals.stop,
        )


def _not_finite(keys: PendingKeys | None) -> bool:
    return keys is not None and not keys.wait().finite

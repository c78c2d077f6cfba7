"""One optimizer step over M micro-batches, on any number of ranks that divides M.

1. The key encoder follows the query encoder (moving average).
2. Keys of the whole global batch, on every rank.
3. M query micro-batches, each contrasted with its own queries and keys and the queue before this step.
4. Running statistics: the mean over the M micro-batches.
5. If the update was applied, the queue takes the G keys; the average of the weights, if there is one, moves.

With one encoder for both views (GPaCo) there is no 1 and 2: the rows of both views are anchors and contrasts, with
gradient, and those of the second views are gathered, without gradient, for the queue.

A step in which keys, a loss, running statistics or a gradient norm are not finite on any rank is skipped: weights,
states of the optimizer, statistics and queue stay as they were on every rank. So is one whose gradient norm is far off
the usual, where `engine.max_grad_norm_ratio` says so. Only moving averages of the weights (the key encoder, and that of
`evaluation.weights: ema`) may have been updated, which are finite whenever the weights are.

The host does not wait for the device in a step: what is not finite is found, and the step skipped, on the device. Its
figures are copied to the host behind it.

Ranks wait for each other twice: before the first loss for the keys, and for the gradients. Key images are exchanged
one step ahead (`images_ahead`). Sums of losses and of statistics are reduced during the last backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from paco_ds.contrast.contrast import Contrast
from paco_ds.contrast.key_encoder import PendingImages, PendingKeys, gather_keys
from paco_ds.data.manifest import SHOTS
from paco_ds.data.stream.batches import MicroBatch
from paco_ds.distributed.ranks import MicroBatchLayout, Ranks, to_device
from paco_ds.losses.base import Loss
from paco_ds.losses.distillation import PART
from paco_ds.randomness import DrawPurpose, seed_torch
from paco_ds.training.batch_norm import RunningStatistics
from paco_ds.training.forward import Forward, ForwardResult
from paco_ds.training.gradients import GradientMean
from paco_ds.training.mixup import CutMix, Mixup
from paco_ds.training.optimizer import UsualNorm
from paco_ds.training.parameter_groups import LR_FACTOR
from paco_ds.training.skipping_optimizers import GuardedOptimizer
from paco_ds.training.step_result import StepResult, pack
from paco_ds.training.totals import StepTotals
from paco_ds.training.weight_average import WeightAverage


class Step:
    """One optimizer step of a model, callable with this rank's micro-batches.

    Args:
        engine: the DeepSpeed engine; its module is a `Recogniser`.
        optimizer: of the engine; its guards are set here, so that it skips what must not be applied.
        forward: forward and loss of a micro-batch, through the engine.
        layout: which micro-batches of the step are this rank's.
        ranks: among which keys, gradients and figures are exchanged.
        shots_of_classes: "many", "medium" or "few" for each class.
        contrast: keys and queue; None for methods without contrast.
        seed: of dropout and stochastic depth, which depend on it, the step and the micro-batch.
        stop_requested: asked once a step; if any rank says True, all learn it from `StepResult.stop`.
        steps_per_epoch: required if the loss changes with the epoch.
        mixup: mixes the images of each micro-batch in pairs; for methods without contrast.
        gradients: averages them over ranks; None where DeepSpeed does.
        max_grad_norm_ratio: a step whose gradient norm is more than so many times the usual one is skipped.
        average: of the weights, for evaluations.

    Raises:
        ValueError: the loss changes with the epoch and `steps_per_epoch` is missing.
    """

    def __init__(
        self,
        engine: Any,
        optimizer: GuardedOptimizer,
        forward: Forward,
        layout: MicroBatchLayout,
        ranks: Ranks,
        shots_of_classes: Sequence[str],
        contrast: Contrast | None = None,
        *,
        seed: int = 0,
        stop_requested: Callable[[], bool] = lambda: False,
        steps_per_epoch: int | None = None,
        mixup: Mixup | CutMix | None = None,
        max_grad_norm_ratio: float | None = None,
        gradients: GradientMean | None = None,
        average: WeightAverage | None = None,
    ) -> None:
        loss = forward.loss
        assert isinstance(loss, Loss)
        if loss.changes_with_epoch and steps_per_epoch is None:
            raise ValueError("this loss changes from one epoch to the next: Step needs steps_per_epoch")
        self.engine, self.optimizer, self.forward = engine, optimizer, forward
        self.layout, self.ranks, self.contrast, self.gradients = layout, ranks, contrast, gradients
        self.steps_per_epoch, self.mixup, self.stop_requested = steps_per_epoch, mixup, stop_requested
        self.seed, self.average = seed, average
        self.part_names, self._begin_epoch = loss.part_names, loss.begin_epoch
        if forward.distillation is not None:
            self.part_names = (*self.part_names, PART)
        self.statistics = RunningStatistics(engine.module, ranks.device)
        self.usual_norm = UsualNorm(device=ranks.device)
        self.max_grad_norm_ratio = max_grad_norm_ratio
        shots_C = torch.tensor([SHOTS.index(s) for s in shots_of_classes])
        self.shots_CS = torch.eye(len(SHOTS), dtype=torch.float64)[shots_C].to(ranks.device)

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
            group["lr"] = lr * group[LR_FACTOR]
        if self.steps_per_epoch is not None:
            self._begin_epoch(step // self.steps_per_epoch)
        replaced = sum(len(b.replaced) for b in micro_batches)
        totals = StepTotals(self.shots_CS, self.part_names, replaced, self.stop_requested())

        pending = self._make_keys(step, micro_batches, key_images)
        self.optimizer.applied = None
        self.optimizer.guard = lambda: totals.finite() if pending is None else totals.finite() & pending.wait().finite
        self.optimizer.norm_guard = self._near_the_usual
        newest = self._run_queries(step, micro_batches, pending, totals)
        # of a skipped step too: no collective outlives its step
        vector, keys = totals.vector, None if newest is None else newest.wait()
        applied = self._applied()
        self.statistics.finish_step(self.layout.micro_batches, step, applied)
        queue = None if self.contrast is None else self.contrast.queue
        if queue is not None and keys is not None:
            queue.push(keys.keys_GD, keys.labels_G, applied)
        if self.average is not None:
            self.average.update(step)
        norm = self._grad_norm()
        ratio = self.usual_norm.ratio(norm)
        self.usual_norm.add(norm, applied)
        keys_finite = torch.ones_like(applied) if pending is None else pending.wait().finite
        figures = pack(
            keys_finite=keys_finite,
            applied=applied,
            grad_norm=norm,
            ratio=ratio,
            pushed=norm if queue is None else queue.pushed,
            totals=vector,
        )
        length = None if queue is None else len(queue.keys_KD)
        return StepResult(figures, self.part_names, self.layout.micro_batches, length)

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
            totals.add(output, result.labels)
            if self.forward.two_views and self.contrast is not None:
                second_views.append(result.second_view_rows)
            if micro_batch is micro_batches[-1]:
                # reduced during the last backward, after which DeepSpeed reduces gradients and steps
                sums = self.statistics.sums()
                totals.begin_sum(self.ranks, sums)
                self.statistics.begin_mean(sums, self.ranks)
                if second_views:
                    labels = torch.cat([b.labels for b in micro_batches])
                    pending = gather_keys(self.layout, self.ranks, torch.cat(second_views), labels)
                if self.gradients is not None:
                    self.gradients.begin()
            self.engine.backward(output.loss)
            if micro_batch is micro_batches[-1] and self.gradients is not None:
                self.gradients.finish()
            self.engine.step()
        return pending

    def _forward(self, step: int, j: int, micro_batch: MicroBatch) -> ForwardResult:
        """The model's forward on micro-batch j, on the device."""
        device = self.ranks.device
        query, labels = (to_device(t, device) for t in (micro_batch.query, micro_batch.labels))
        key = None
        if self.forward.two_views and micro_batch.key is not None:
            key = to_device(micro_batch.key, device)
        mix = None if self.mixup is None else self.mixup.draw(step, j, len(labels))
        seed_torch(DrawPurpose.QUERY_DROPOUT, self.seed, step, j)
        return self.forward.run_model(query, key, labels, mix)

    def _applied(self) -> Tensor:
        """Whether the step of the engine was applied: a bool scalar on the device."""
        if self.optimizer.applied is None or not self.engine.was_step_applied():  # DeepSpeed skipped it, on the host
            return torch.zeros((), dtype=torch.bool, device=self.ranks.device)
        return self.optimizer.applied

    def _near_the_usual(self) -> Tensor | None:
        """Whether the gradient norm is not too far off the usual one."""
        if self.max_grad_norm_ratio is None:
            return None
        return ~(self.usual_norm.ratio(self._grad_norm()) > self.max_grad_norm_ratio)

    def _grad_norm(self) -> Tensor:
        """The L2 norm before clipping of the last step, from the moment the optimizer is asked to step: a float64
        scalar on the device."""
        # the engine's own get_global_grad_norm has it only after the step
        norm = self.optimizer.grad_norm if self.optimizer.whole else self.engine.optimizer._global_grad_norm
        if isinstance(norm, Tensor):
            return norm.detach().to(self.ranks.device, torch.float64).reshape(())
        return torch.full((), math.nan if norm is None else norm, dtype=torch.float64, device=self.ranks.device)

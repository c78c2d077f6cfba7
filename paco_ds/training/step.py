"""One optimizer step over M micro-batches, whoever computes them: the heart.

1. The key encoder follows the query encoder (moving average).
2. Keys of the whole global batch, on every rank.
3. M query micro-batches, each against its own queries and keys and the queue as it stood before this step.
4. Running statistics: the mean over the M micro-batches.
5. If the update was applied, the queue takes the G keys.

With one encoder for both views (GPaCo) 1 and 2 fall away: the rows of both views are anchors and contrasts, with
gradient, and those of the second views are gathered, without, for the queue.

Guard: keys, a loss or a gradient norm that are not finite change no rank's weights, momentum, statistics or queue.
Only the moving average may stand, which is finite whenever the weights are.

Ranks wait for each other twice: before the first loss for the keys, and for the gradients. The images whose keys they
make came while the step before computed, where `begin_exchange` was called for them then. What they add up of losses
and statistics is on its way during the last backward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from paco_ds.contrast.key_encoder import KeyEncoder, Keys, PendingImages, PendingKeys, gather_keys
from paco_ds.contrast.key_queue import KeyQueue, QueueSnapshot, digest
from paco_ds.data.manifest import SHOTS
from paco_ds.data.stream.batches import MicroBatch
from paco_ds.distributed.ranks import MicroBatchLayout, Pending, Ranks
from paco_ds.errors import TrainingError
from paco_ds.losses.base import Loss, LossOutput
from paco_ds.losses.distillation import PART, Distillation
from paco_ds.models.recogniser import concat_experts, split_experts
from paco_ds.training.batch_norm import RunningStatistics
from paco_ds.training.mixup import Mix, Mixup
from paco_ds.training.optimizer import GuardedSGD


@dataclass(frozen=True)
class StepResult:
    """What a step did, the same on every rank.

    Attributes:
        loss: mean over the global batch; nan if keys were skipped before it was known.
        grad_norm: L2 norm before clipping; nan if skipped before it was known.
        skipped: why nothing was changed ("keys", "loss" or "gradient" not finite), or None.
        center_probability, center_probability_optimum: mean over the anchors of each shot; None without any.
        positive_probability, positive_probability_optimum: the same over its anchors that have a positive.
        parts: what the loss is made of, by name, means over the global batch; nan as the loss.
        replaced: samples of this step, on all ranks, that could not be read.
        stop: some rank was asked to stop.
    """

    loss: float
    grad_norm: float
    skipped: str | None
    center_probability: Mapping[str, float | None]
    center_probability_optimum: Mapping[str, float | None]
    positive_probability: Mapping[str, float | None]
    positive_probability_optimum: Mapping[str, float | None]
    parts: Mapping[str, float]
    replaced: int
    stop: bool


class _Totals:
    """What ranks add up in the one reduction of a step: flags and sums, then for centers and for positives
    [probability, its optimum, anchors] by shot, then the parts of the loss."""

    def __init__(self, device: torch.device, part_names: Sequence[str] = ()) -> None:
        self.part_names = part_names
        self.vector = torch.zeros(_FIRST_PART + len(part_names), dtype=torch.float64, device=device)
        self._of_ranks: Pending | None = None

    def add(self, output: LossOutput, shots_B: Tensor) -> None:
        loss = output.loss.detach()
        self.vector[0] += ~torch.isfinite(loss)
        self.vector[1] += loss
        for i, name in enumerate(self.part_names, start=_FIRST_PART):
            self.vector[i] += output.parts[name]
        watched = [
            (output.center_probability_B, output.center_optimum_B),
            (output.positive_probability_B, output.positive_optimum_B),
        ]
        for sums, (probability_B, optimum_B) in zip(self._by_shot(), watched, strict=True):
            if probability_B is None or optimum_B is None:
                continue
            # The optimum is nan for an anchor without a positive, and for no other reason: it is left out. A
            # probability that is nan beside it says that something is not finite, and stays.
            counted_B = ~optimum_B.isnan()
            rows_3B = torch.stack([probability_B, optimum_B, torch.ones_like(optimum_B)]).where(counted_B, 0.0)
            sums.index_add_(1, shots_B, rows_3B.double())

    def begin_sum(self, ranks: Ranks) -> None:
        """Begin to add up over ranks; nothing is added from here on."""
        self._of_ranks = ranks.begin_sum(self.vector)

    def not_finite(self) -> bool:
        """Whether a loss of any rank was not. From here on the sums lie on the host, read once."""
        if self._of_ranks is not None:
            self.vector, self._of_ranks = self._of_ranks.wait().cpu(), None
        return bool(self.vector[0])

    def centers(self, row: int) -> dict[str, float | None]:
        return _means(self._by_shot()[0], row)

    def positives(self, row: int) -> dict[str, float | None]:
        return _means(self._by_shot()[1], row)

    def parts(self, micro_batches: int) -> dict[str, float]:
        """Means over micro-batches."""
        return {name: float(self.vector[_FIRST_PART + i]) / micro_batches for i, name in enumerate(self.part_names)}

    def _by_shot(self) -> Tensor:
        return self.vector[4:_FIRST_PART].view(2, 3, len(SHOTS))


_FIRST_PART = 4 + 2 * 3 * len(SHOTS)


def _means(sums: Tensor, row: int) -> dict[str, float | None]:
    total, anchors = sums[row], sums[2]
    return {shot: float(total[i] / anchors[i]) if anchors[i] else None for i, shot in enumerate(SHOTS)}


@dataclass(frozen=True)
class _Rows:
    """What the model makes of a micro-batch: the views as it saw them, labels and rows as the loss takes them; with one
    encoder for both views also the second views' rows, without gradient."""

    views: Sequence[Tensor]
    labels: Tensor
    logits: Tensor
    query: Tensor | None
    prototypes: Sequence[Tensor]
    second: Tensor | None = None


class Step:
    """One optimizer step of a model, callable with this rank's micro-batches.

    Args:
        engine: the DeepSpeed engine; its module is a `Recogniser`.
        shots_of_classes: "many", "medium" or "few" for each class.
        key_encoder: None for methods without contrast, and where one encoder makes both views (GPaCo).
        queue: None for methods without contrast.
        contrast_scope: "global_batch" holds a query against the keys of the whole step, "micro_batch" (published)
            against those of its own micro-batch.
        experts: how many the model has, None of a model without.
        stop_requested: asked once a step; if any rank says True, all learn of it in `StepResult.stop`.
        steps_per_epoch: of a loss that changes over training, which is told the epoch of each step.
        mixup: mixes the images of each micro-batch in pairs; for methods without contrast.
        distillation: adds what a teacher has to say; for methods that train centers.

    Raises:
        ValueError: the loss changes over training and `steps_per_epoch` is missing.
    """

    def __init__(
        self,
        engine: Any,
        optimizer: GuardedSGD,
        loss: Loss,
        layout: MicroBatchLayout,
        ranks: Ranks,
        shots_of_classes: Sequence[str],
        key_encoder: KeyEncoder | None = None,
        queue: KeyQueue | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
        contrast_scope: Literal["micro_batch", "global_batch"] = "micro_batch",
        experts: int | None = None,
        steps_per_epoch: int | None = None,
        mixup: Mixup | None = None,
        distillation: Distillation | None = None,
    ) -> None:
        if loss.changes_with_epoch and steps_per_epoch is None:
            raise ValueError("this loss changes from one epoch to the next: Step needs steps_per_epoch")
        self.engine, self.optimizer, self.loss = engine, optimizer, loss
        self.layout, self.ranks = layout, ranks
        self.key_encoder, self.queue, self.contrast_scope = key_encoder, queue, contrast_scope
        self.experts, self.steps_per_epoch, self.mixup = experts, steps_per_epoch, mixup
        self.part_names, self._begin_epoch = loss.part_names, loss.begin_epoch
        self.distillation = distillation
        if distillation is not None:
            self.part_names = (*self.part_names, PART)
        self.statistics = RunningStatistics(engine.module)
        self.stop_requested = stop_requested
        self._shots_C = torch.tensor([SHOTS.index(s) for s in shots_of_classes], device=ranks.device)

    def begin_exchange(self, step: int, micro_batches: Sequence[MicroBatch]) -> PendingImages | None:
        """Begin to send the images of a step to the ranks that make their keys; None if there is no key encoder."""
        if self.key_encoder is None:
            return None
        return self.key_encoder.begin_exchange(step, [b.key for b in micro_batches if b.key is not None])

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
        totals = _Totals(self.ranks.device, self.part_names)
        totals.vector[2] = sum(len(b.replaced) for b in micro_batches)
        totals.vector[3] = self.stop_requested()

        pending = self._make_keys(step, micro_batches, key_images)
        self.optimizer.guard = lambda: totals.not_finite() or _not_finite(pending)
        newest = self._run_queries(step, micro_batches, pending, totals)
        skipped = self._skip_reason(totals, pending)
        keys = None if newest is None else newest.wait()  # of a skipped step too: no collective outlives its step
        if skipped:
            self.statistics.skip_step()
        else:
            self.statistics.finish_step(self.layout.micro_batches, step)
            if self.queue is not None and keys is not None:
                self.queue.push(keys.keys_GD, keys.labels_G)
        return self._result(totals, skipped, known=skipped != "keys")

    def _make_keys(
        self, step: int, micro_batches: Sequence[MicroBatch], images: PendingImages | None
    ) -> PendingKeys | None:
        if self.key_encoder is None:
            return None
        images = images or self.begin_exchange(step, micro_batches)
        assert images is not None
        self.key_encoder.update(step)
        return self.key_encoder.keys(step, images, [b.labels for b in micro_batches])

    def _run_queries(
        self, step: int, micro_batches: Sequence[MicroBatch], pending: PendingKeys | None, totals: _Totals
    ) -> PendingKeys | None:
        """Forward and backward of every micro-batch, and the update. Returns the keys that the queue is to take."""
        keys, snapshot, second_rows = None, None, []
        self.statistics.begin_step()
        for j, micro_batch in zip(self.layout.own, micro_batches, strict=True):
            self.statistics.begin_micro_batch()
            mix = None if self.mixup is None else self.mixup.draw(step, j, len(micro_batch.labels))
            rows = self._forward(micro_batch, mix)
            self.statistics.end_micro_batch()
            if micro_batch is micro_batches[0]:
                keys = None if pending is None else pending.wait()
                snapshot = self._queue_snapshot(keys)
            loss = self._loss(j, rows, mix, keys, snapshot, totals)
            if rows.second is not None:
                second_rows.append(rows.second)
            if micro_batch is micro_batches[-1]:
                # on their way during the last backward, after which DeepSpeed reduces gradients and steps
                totals.begin_sum(self.ranks)
                self.statistics.begin_mean(self.ranks)
                if second_rows:
                    labels = torch.cat([b.labels for b in micro_batches])
                    pending = gather_keys(self.layout, self.ranks, torch.cat(second_rows), labels)
            self.engine.backward(loss)
            self.engine.step()
        return pending

    def _queue_snapshot(self, keys: Keys | None) -> QueueSnapshot | None:
        """The queue as it stood before this step; for a global scope with this step's keys, which have no gradient
        either."""
        if self.queue is None:
            return None
        newest = None if keys is None or self.contrast_scope == "micro_batch" else (keys.keys_GD, keys.labels_G)
        snapshot = self.queue.snapshot(len(self._shots_C), newest)
        return snapshot if self.experts is None else snapshot.experts(self.experts)

    def _forward(self, micro_batch: MicroBatch, mix: Mix | None) -> _Rows:
        device = self.ranks.device
        labels = micro_batch.labels.to(device, non_blocking=True)
        images = micro_batch.query.to(device, non_blocking=True)
        if self.queue is not None and self.key_encoder is None:
            assert micro_batch.key is not None
            views = [images, micro_batch.key.to(device, non_blocking=True)]
            logits, query, *prototypes = self.engine(*views)
            second = concat_experts(query[..., len(images) :, :]).detach()
            # anchor i then meets the 2 m - 1 other rows of both views, which is what the loss makes of queries alone
            return _Rows(views, labels.repeat(2), logits, query, prototypes, second)
        if mix is not None:
            images = mix.images(images)
        logits, query, *prototypes = self.engine(images)
        return _Rows([images], labels, logits, query, prototypes)

    def _loss(
        self,
        j: int,
        rows: _Rows,
        mix: Mix | None,
        keys: Keys | None,
        queue: QueueSnapshot | None,
        totals: _Totals,
    ) -> Tensor:
        """Loss of micro-batch j."""
        own_keys = None
        if keys is not None and self.contrast_scope == "micro_batch":
            slots = self.layout.slots(j)
            own_keys = split_experts(keys.keys_GD[slots.start : slots.stop], self.experts)
        output: LossOutput = self.loss(rows.labels, rows.logits, rows.query, own_keys, queue, *rows.prototypes)
        if mix is not None:
            partners = rows.labels[mix.partners.to(rows.labels.device)]
            other: LossOutput = self.loss(partners, rows.logits, rows.query, own_keys, queue)
            output = mix.outputs(output, other)
        if self.distillation is not None:
            output = self.distillation(output, rows.logits, *rows.views)
        totals.add(output, self._shots_C[rows.labels])
        return output.loss

    def _skip_reason(self, totals: _Totals, pending: PendingKeys | None) -> str | None:
        # first, and always: the flags that ranks must agree on lie in the same sum
        loss_not_finite = totals.not_finite()
        if _not_finite(pending):
            return "keys"
        if loss_not_finite:
            return "loss"
        if self.optimizer.skipped or not self.engine.was_step_applied():
            return "gradient"
        return None

    def _grad_norm(self) -> float:
        norm = self.optimizer.grad_norm if self.optimizer.whole else self.engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def _result(self, totals: _Totals, skipped: str | None, known: bool) -> StepResult:
        return StepResult(
            loss=float(totals.vector[1]) / self.layout.micro_batches if known else float("nan"),
            grad_norm=self._grad_norm() if skipped in (None, "gradient") else float("nan"),
            skipped=skipped,
            center_probability=totals.centers(0),
            center_probability_optimum=totals.centers(1),
            positive_probability=totals.positives(0),
            positive_probability_optimum=totals.positives(1),
            parts=totals.parts(self.layout.micro_batches) if known else dict.fromkeys(self.part_names, float("nan")),
            replaced=int(totals.vector[2]),
            stop=bool(totals.vector[3]),
        )


def _not_finite(keys: PendingKeys | None) -> bool:
    return keys is not None and not keys.wait().finite


def check_replicas_equal(step: Step) -> None:
    """Compare digests of queue and buffers between ranks.

    Raises:
        TrainingError: names what differs and the ranks where it does, or, where no value is that of more than half of
            them, the ranks that agree with each other; going on would train different models.
    """
    digests = {"buffers": digest(step.engine.module.buffers())}
    if step.queue is not None:
        digests["queue"] = step.queue.digest()
    gathered = step.ranks.gather(torch.stack([d.to(step.ranks.device) for d in digests.values()])).tolist()
    differences = []
    for name, of_ranks in zip(digests, zip(*gathered, strict=True), strict=True):
        most, count = Counter(of_ranks).most_common(1)[0]
        if count == len(of_ranks):
            continue
        if count > len(of_ranks) / 2:
            odd = [rank for rank, value in enumerate(of_ranks) if value != most]
            differences.append(f"{name} of ranks {odd} differ from those of the other {count} ranks")
        else:
            alike = [str([rank for rank, v in enumerate(of_ranks) if v == value]) for value in dict.fromkeys(of_ranks)]
            differences.append(f"{name} differ between ranks {' and '.join(alike)}, and nothing tells which are right")
    if differences:
        raise TrainingError(
            f"{'; '.join(differences)}. Their results cannot be trusted: run again from the last checkpoint, and check "
            f"the memory and network of these hosts"
        )

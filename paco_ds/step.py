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
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from paco_ds.data.manifest import SHOTS
from paco_ds.data.stream import MicroBatch
from paco_ds.distributed import MicroBatchLayout, Ranks
from paco_ds.errors import TrainingError
from paco_ds.key_encoder import KeyEncoder, Keys, gather_keys
from paco_ds.key_queue import KeyQueue, QueueSnapshot, digest
from paco_ds.losses.base import Loss, LossOutput
from paco_ds.losses.distillation import PART, Distillation
from paco_ds.mixup import Mix, Mixup
from paco_ds.models.recogniser import beside_each_other, by_expert
from paco_ds.models.statistics import RunningStatistics
from paco_ds.optimizer import GuardedSGD


@dataclass(frozen=True)
class StepResult:
    """What a step did, the same on every rank.

    Attributes:
        loss: mean over the global batch; nan if keys were refused before it was known.
        grad_norm: L2 norm before clipping; nan if refused before it was known.
        refused: why nothing was changed ("keys", "loss" or "gradient" not finite), or None.
        center_probability, center_probability_optimum: mean over the anchors of each shot; None without any.
        positive_probability, positive_probability_optimum: the same over its anchors that have a positive.
        parts: what the loss is made of, by name, means over the global batch; nan as the loss.
        replaced: samples of this step, on all ranks, that could not be read.
        stop: some rank was asked to stop.
    """

    loss: float
    grad_norm: float
    refused: str | None
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

    def reduce(self, ranks: Ranks) -> None:
        """Add up over ranks; from here on the sums lie on the host, read once."""
        self.vector = ranks.sum(self.vector).cpu()

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

    def __call__(self, step: int, micro_batches: Sequence[MicroBatch], lr: float) -> StepResult:
        """Run global step `step` (from 0) with this rank's A micro-batches, in the order of `layout.own`."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.refuse = False
        if self.steps_per_epoch is not None:
            self._begin_epoch(step // self.steps_per_epoch)
        totals = _Totals(self.ranks.device, self.part_names)
        totals.vector[2] = sum(len(b.replaced) for b in micro_batches)
        totals.vector[3] = self.stop_requested()

        keys = self._make_keys(step, micro_batches)
        if keys is not None and not keys.finite:
            totals.reduce(self.ranks)
            return self._result(totals, "keys", known=False)
        second_rows = self._run_queries(step, micro_batches, keys, totals)
        refused = self._refusal(totals)
        if refused:
            self.statistics.restore()
        else:
            self.statistics.finish_step(self.ranks, self.layout.micro_batches, step)
            if self.queue is not None:
                if keys is None:
                    labels = torch.cat([b.labels for b in micro_batches])
                    keys = gather_keys(self.layout, self.ranks, torch.cat(second_rows), labels)
                self.queue.push(keys.keys_GD, keys.labels_G)
        return self._result(totals, refused, known=True)

    def _make_keys(self, step: int, micro_batches: Sequence[MicroBatch]) -> Keys | None:
        if self.key_encoder is None:
            return None
        self.key_encoder.update(step)
        views = [b.key for b in micro_batches if b.key is not None]
        return self.key_encoder.keys(step, views, [b.labels for b in micro_batches])

    def _run_queries(
        self, step: int, micro_batches: Sequence[MicroBatch], keys: Keys | None, totals: _Totals
    ) -> list[Tensor]:
        """Forward and backward of every micro-batch, and the update. Returns the second views' rows, if one encoder
        makes both."""
        snapshot, second_rows = self._queue_snapshot(keys), []
        self.statistics.begin_step()
        for j, micro_batch in zip(self.layout.own, micro_batches, strict=True):
            self.statistics.begin_micro_batch()
            mix = None if self.mixup is None else self.mixup.draw(step, j, len(micro_batch.labels))
            loss, second = self._query_loss(j, micro_batch, mix, keys, snapshot, totals)
            if second is not None:
                second_rows.append(second)
            self.statistics.end_micro_batch()
            if micro_batch is micro_batches[-1]:
                # before the last backward, which lets DeepSpeed reduce gradients and step
                totals.reduce(self.ranks)
                self.optimizer.refuse = bool(totals.vector[0])
            self.engine.backward(loss)
            self.engine.step()
        return second_rows

    def _queue_snapshot(self, keys: Keys | None) -> QueueSnapshot | None:
        """The queue as it stood before this step; for a global scope with this step's keys, which have no gradient
        either."""
        if self.queue is None:
            return None
        newest = None if keys is None or self.contrast_scope == "micro_batch" else (keys.keys_GD, keys.labels_G)
        snapshot = self.queue.snapshot(len(self._shots_C), newest)
        return snapshot if self.experts is None else snapshot.experts(self.experts)

    def _query_loss(
        self,
        j: int,
        micro_batch: MicroBatch,
        mix: Mix | None,
        keys: Keys | None,
        queue: QueueSnapshot | None,
        totals: _Totals,
    ) -> tuple[Tensor, Tensor | None]:
        """(loss of a micro-batch, its second views' rows without gradient or None)."""
        device = self.ranks.device
        labels = micro_batch.labels.to(device, non_blocking=True)
        images = micro_batch.query.to(device, non_blocking=True)
        own_keys = second_rows = None
        if self.queue is not None and keys is None:
            assert micro_batch.key is not None
            # anchor i then meets the 2 m - 1 other rows of both views, which is what the loss makes of queries alone
            labels = labels.repeat(2)
            views = [images, micro_batch.key.to(device, non_blocking=True)]
            logits, query, *prototypes = self.engine(*views)
            second_rows = beside_each_other(query[..., len(images) :, :]).detach()
        else:
            views = [images if mix is None else mix.images(images)]
            logits, query, *prototypes = self.engine(*views)
            if keys is not None and self.contrast_scope == "micro_batch":
                lanes = self.layout.lanes(j)
                own_keys = by_expert(keys.keys_GD[lanes.start : lanes.stop], self.experts)
        output: LossOutput = self.loss(labels, logits, query, own_keys, queue, *prototypes)
        if mix is not None:
            other: LossOutput = self.loss(labels[mix.partners.to(device)], logits, query, own_keys, queue)
            output = mix.outputs(output, other)
        if self.distillation is not None:
            output = self.distillation(output, logits, *views)
        totals.add(output, self._shots_C[labels])
        return output.loss, second_rows

    def _refusal(self, totals: _Totals) -> str | None:
        if totals.vector[0]:
            return "loss"
        if self.optimizer.refuse or not self.engine.was_step_applied():
            return "gradient"
        return None

    def _grad_norm(self) -> float:
        norm = self.optimizer.grad_norm if self.optimizer.whole else self.engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def _result(self, totals: _Totals, refused: str | None, known: bool) -> StepResult:
        return StepResult(
            loss=float(totals.vector[1]) / self.layout.micro_batches if known else float("nan"),
            grad_norm=self._grad_norm() if refused in (None, "gradient") else float("nan"),
            refused=refused,
            center_probability=totals.centers(0),
            center_probability_optimum=totals.centers(1),
            positive_probability=totals.positives(0),
            positive_probability_optimum=totals.positives(1),
            parts=totals.parts(self.layout.micro_batches) if known else dict.fromkeys(self.part_names, float("nan")),
            replaced=int(totals.vector[2]),
            stop=bool(totals.vector[3]),
        )


def prove_ranks_agree(step: Step) -> None:
    """Compare digests of queue and buffers between ranks.

    Raises:
        TrainingError: names what differs and the ranks where it does; going on would train different models.
    """
    digests = {"buffers": digest(step.engine.module.buffers())}
    if step.queue is not None:
        digests["queue"] = step.queue.digest()
    gathered = step.ranks.gather(torch.stack([d.to(step.ranks.device) for d in digests.values()])).tolist()
    differences = []
    for name, of_ranks in zip(digests, zip(*gathered, strict=True), strict=True):
        most, count = Counter(of_ranks).most_common(1)[0]
        if count < len(of_ranks):
            odd = [rank for rank, value in enumerate(of_ranks) if value != most]
            differences.append(f"{name} of ranks {odd} differ from those of the other {count} ranks")
    if differences:
        raise TrainingError(
            f"{'; '.join(differences)}. Their results cannot be trusted: run again from the last checkpoint, and check "
            f"the memory and network of these hosts"
        )

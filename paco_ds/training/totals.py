"""Sums over the micro-batches and ranks of a step: one float64 vector, added up by one all_reduce."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from paco_ds.data.manifest import SHOTS
from paco_ds.distributed.ranks import Pending, Ranks, to_device
from paco_ds.losses.base import LossOutput

_STATISTICS, _REPLACED, _STOP, _LOSS = range(4)
_FIRST_PART = _LOSS + 1
_OF_SHOT = 6 * len(SHOTS)


class StepTotals:
    """The vector: ranks with statistics not finite, samples replaced, ranks asked to stop, sum of losses, then of the
    parts of the loss; then for centers and for positives [probability, its optimum] and [anchors] by shot. `Totals`
    reads it.

    Args:
        shots_CS: of each class a row that marks its shot by 1, float64, on the device.
        part_names: of the loss.
        replaced: samples of this rank's micro-batches that could not be read.
        stop: whether this rank was asked to stop.
    """

    def __init__(self, shots_CS: Tensor, part_names: Sequence[str] = (), replaced: int = 0, stop: bool = False) -> None:
        self._shots_CS, self._part_names = shots_CS, part_names
        known = torch.zeros(_FIRST_PART + len(part_names) + _OF_SHOT, dtype=torch.float64)
        known[_REPLACED], known[_STOP] = replaced, stop
        self._vector = to_device(known, shots_CS.device)
        self._outputs: list[LossOutput] = []
        self._labels: list[Tensor] = []
        self._of_ranks: Pending | None = None

    def add(self, output: LossOutput, labels_B: Tensor) -> None:
        """Add a micro-batch: its loss, and its probabilities by the shot of each anchor's class."""
        self._outputs.append(output)
        self._labels.append(labels_B)

    def begin_sum(self, ranks: Ranks, statistics: Tensor) -> None:
        """Begin the all_reduce; nothing is added afterwards.

        Args:
            statistics: this rank's sums of running statistics: one that is not finite would stay in the weights.
        """
        outputs, count = self._outputs, len(self._outputs)
        losses = [o.loss.detach() for o in outputs] + [o.parts[name] for name in self._part_names for o in outputs]
        sums = torch.stack(losses).double().view(-1, count).sum(1)
        finite = torch.linalg.vector_norm(statistics, dtype=torch.float64) < math.inf
        by_shot = self._by_shot().flatten()
        self._outputs, self._labels = [], []
        own = torch.cat([(~finite)[None], sums.new_zeros(_LOSS - _STATISTICS - 1), sums, by_shot])
        self._of_ranks = ranks.begin_sum(self._vector.add_(own))

    def _by_shot(self) -> Tensor:
        """[6, S]: sums of the four values over the anchors of each shot, then the anchors that have the first two, and
        those that have the others."""
        names = ("center_probability_B", "center_optimum_B", "positive_probability_B", "positive_optimum_B")
        given = [getattr(output, name) for name in names for output in self._outputs]
        if any(each is None for each in given):
            none_B = torch.full(self._labels[0].shape, math.nan, device=self._labels[0].device)
            given = [none_B if each is None else each for each in given]
        rows_4N = torch.stack(given).view(4, -1)
        # The optimum is nan exactly where an anchor has no positive, which is left out. A probability that is nan
        # beside a finite optimum says that something is not finite, and is kept.
        uncounted_2N = rows_4N[1::2].isnan()
        rows_4N = rows_4N.masked_fill(uncounted_2N.repeat_interleave(2, 0, output_size=4), 0.0)
        return torch.cat([rows_4N, ~uncounted_2N]).double() @ self._shots_CS[torch.cat(self._labels)]

    @property
    def vector(self) -> Tensor:
        """The sums over all ranks, on the device; the device waits for the all_reduce, the host does not on CUDA."""
        return self._vector if self._of_ranks is None else self._of_ranks.wait()

    def finite(self) -> Tensor:
        """Whether the losses and statistics of all ranks are finite: a bool scalar on the device. The sum of losses is
        finite only if each is."""
        vector = self.vector
        return (vector[_LOSS].abs() < math.inf) & (vector[_STATISTICS] == 0)


class Totals:
    """A vector of `StepTotals` on the host.

    Attributes:
        loss: sum over micro-batches.
        replaced: samples that could not be read.
        stop: whether some rank was asked to stop.
        not_finite: what of any rank is not finite: "loss", "statistics" or nothing (None).
    """

    def __init__(self, vector: Tensor, part_names: Sequence[str]) -> None:
        figures = vector.tolist()
        self.loss, self.replaced, self.stop = figures[_LOSS], int(figures[_REPLACED]), bool(figures[_STOP])
        self.not_finite = "loss" if not math.isfinite(self.loss) else "statistics" if figures[_STATISTICS] else None
        self._parts = dict(zip(part_names, figures[_FIRST_PART:], strict=False))
        self._by_shot = vector[-_OF_SHOT:].view(6, len(SHOTS)).tolist()

    def centers(self, row: int) -> dict[str, float | None]:
        """Mean by shot of p_c (row 0) or its optimum (row 1); None for a shot without anchors."""
        return self._means(row, 4)

    def positives(self, row: int) -> dict[str, float | None]:
        """The same of p+."""
        return self._means(2 + row, 5)

    def parts(self, micro_batches: int) -> dict[str, float]:
        """Means over micro-batches."""
        return {name: total / micro_batches for name, total in self._parts.items()}

    def _means(self, row: int, counts: int) -> dict[str, float | None]:
        total, anchors = self._by_shot[row], self._by_shot[counts]
        return {shot: total[i] / anchors[i] if anchors[i] else None for i, shot in enumerate(SHOTS)}

"""Sums over the micro-batches and ranks of a step: one float64 vector, added up by one all_reduce."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paco_ds.data.manifest import SHOTS
from paco_ds.distributed.ranks import Pending, Ranks
from paco_ds.losses.base import LossOutput

_NOT_FINITE, _STATISTICS, _LOSS, _REPLACED, _STOP, _BY_SHOT = range(6)
_FIRST_PART = _BY_SHOT + 2 * 3 * len(SHOTS)


class StepTotals:
    """The vector: losses not finite, ranks with statistics not finite, sum of losses, samples replaced, ranks asked to
    stop; then for centers and for positives [probability, its optimum, anchors] by shot; then the parts of the loss.

    Args:
        part_names: of the loss.
        replaced: samples of this rank's micro-batches that could not be read.
        stop: whether this rank was asked to stop.
    """

    def __init__(
        self, device: torch.device, part_names: Sequence[str] = (), replaced: int = 0, stop: bool = False
    ) -> None:
        self.part_names = part_names
        self.vector = torch.zeros(_FIRST_PART + len(part_names), dtype=torch.float64, device=device)
        self.vector[_REPLACED], self.vector[_STOP] = replaced, stop
        self._of_ranks: Pending | None = None

    def add(self, output: LossOutput, shots_B: Tensor) -> None:
        """Add a micro-batch: its loss, and its probabilities by the shot of each anchor."""
        loss = output.loss.detach()
        self.vector[_NOT_FINITE] += ~torch.isfinite(loss)
        self.vector[_LOSS] += loss
        for i, name in enumerate(self.part_names, start=_FIRST_PART):
            self.vector[i] += output.parts[name]
        watched = [
            (output.center_probability_B, output.center_optimum_B),
            (output.positive_probability_B, output.positive_optimum_B),
        ]
        for sums, (probability_B, optimum_B) in zip(self._by_shot(), watched, strict=True):
            if probability_B is None or optimum_B is None:
                continue
            # The optimum is nan exactly where an anchor has no positive, which is left out. A probability that is nan
            # beside a finite optimum says that something is not finite, and is kept.
            counted_B = ~optimum_B.isnan()
            rows_3B = torch.stack([probability_B, optimum_B, torch.ones_like(optimum_B)]).where(counted_B, 0.0)
            sums.index_add_(1, shots_B, rows_3B.double())

    def add_statistics(self, sums: Tensor) -> None:
        """Add whether this rank's sums of running statistics are finite: one that is not would stay in the weights."""
        self.vector[_STATISTICS] += ~torch.isfinite(sums).all()

    def begin_sum(self, ranks: Ranks) -> None:
        """Begin the all_reduce; nothing is added afterwards."""
        self._of_ranks = ranks.begin_sum(self.vector)

    def not_finite(self) -> str | None:
        """What of any rank is not finite: "loss", "statistics" or nothing (None). Waits for the all_reduce; the sums
        are copied to the host once."""
        if self._of_ranks is not None:
            self.vector, self._of_ranks = self._of_ranks.wait().cpu(), None
        if self.vector[_NOT_FINITE]:
            return "loss"
        return "statistics" if self.vector[_STATISTICS] else None

    @property
    def loss(self) -> float:
        """Sum over micro-batches."""
        return float(self.vector[_LOSS])

    @property
    def replaced(self) -> int:
        return int(self.vector[_REPLACED])

    @property
    def stop(self) -> bool:
        return bool(self.vector[_STOP])

    def centers(self, row: int) -> dict[str, float | None]:
        """Mean by shot of p_c (row 0) or its optimum (row 1); None for a shot without anchors."""
        return _means(self._by_shot()[0], row)

    def positives(self, row: int) -> dict[str, float | None]:
        """The same of p+."""
        return _means(self._by_shot()[1], row)

    def parts(self, micro_batches: int) -> dict[str, float]:
        """Means over micro-batches."""
        return {name: float(self.vector[_FIRST_PART + i]) / micro_batches for i, name in enumerate(self.part_names)}

    def _by_shot(self) -> Tensor:
        return self.vector[_BY_SHOT:_FIRST_PART].view(2, 3, len(SHOTS))


def _means(sums: Tensor, row: int) -> dict[str, float | None]:
    total, anchors = sums[row], sums[2]
    return {shot: float(total[i] / anchors[i]) if anchors[i] else None for i, shot in enumerate(SHOTS)}

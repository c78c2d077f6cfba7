"""What an optimizer step did: figures that are read from the device once somebody asks for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from paco_ds.distributed.ranks import HostCopy
from paco_ds.training.totals import Totals

OUTLIER = "outlier"
"""The reason of a step that is skipped for its gradient norm, which is finite."""


class StepResult:
    """What a step did, the same on every rank.

    Its figures are on their way from the device: the first that is asked for waits for the step to end. A loop that
    asks for them once the next step has begun keeps the device busy.
    """

    def __init__(
        self, figures: HostCopy, part_names: Sequence[str], micro_batches: int, queue_length: int | None
    ) -> None:
        self._figures, self._part_names = figures, part_names
        self._micro_batches, self._queue_length = micro_batches, queue_length

    @cached_property
    def _read(self) -> _Read:
        figures = self._figures.wait()
        own = dict(zip(_OWN_FIGURES, figures[: len(_OWN_FIGURES)].tolist(), strict=True))
        return _Read(Totals(figures[len(_OWN_FIGURES) :], self._part_names), **own)

    def wait(self) -> None:
        """Until the figures are on the host."""
        self._figures.wait()

    @cached_property
    def skipped(self) -> str | None:
        """Why nothing was changed ("keys", "loss", "statistics" or "gradient" not finite, or `OUTLIER`), or None."""
        read = self._read
        if not read.keys_finite:
            return "keys"
        if read.totals.not_finite or read.applied:
            return read.totals.not_finite
        return OUTLIER if math.isfinite(read.grad_norm) else "gradient"

    @property
    def loss(self) -> float:
        """Mean over the global batch; nan if the step was skipped before it was known."""
        return math.nan if self.skipped == "keys" else self._read.totals.loss / self._micro_batches

    @property
    def parts(self) -> dict[str, float]:
        """Terms of the loss by name, means over the global batch; nan likewise."""
        if self.skipped == "keys":
            return dict.fromkeys(self._part_names, math.nan)
        return self._read.totals.parts(self._micro_batches)

    @property
    def grad_norm(self) -> float:
        """L2 norm before clipping; nan if the step was skipped before it was known."""
        return self._read.grad_norm if self.skipped in (None, "gradient", OUTLIER) else math.nan

    @property
    def grad_norm_ratio(self) -> float | None:
        """`grad_norm` over its usual value in the steps before; None in the first steps."""
        ratio = self._read.grad_norm_ratio
        return None if math.isnan(ratio) or math.isnan(self.grad_norm) else ratio

    @property
    def center_probability(self) -> dict[str, float | None]:
        """Mean of p_c over the anchors of each shot; None without any."""
        return self._read.totals.centers(0)

    @property
    def center_probability_optimum(self) -> dict[str, float | None]:
        """The same of its optimum."""
        return self._read.totals.centers(1)

    @property
    def positive_probability(self) -> dict[str, float | None]:
        """Mean of p+ over the anchors of each shot that have a positive."""
        return self._read.totals.positives(0)

    @property
    def positive_probability_optimum(self) -> dict[str, float | None]:
        """The same of its optimum."""
        return self._read.totals.positives(1)

    @property
    def replaced(self) -> int:
        """Samples of this step, on all ranks, that could not be read."""
        return self._read.totals.replaced

    @property
    def stop(self) -> bool:
        """Whether some rank was asked to stop."""
        return self._read.totals.stop

    @property
    def queue_fill(self) -> float:
        """Filled share of the queue after the step, 0 to 1; 0 without one."""
        if self._queue_length is None:
            return 0.0
        return min(1.0, self._read.pushed / self._queue_length) if self._queue_length else 1.0


def skip_reason(result: StepResult) -> str | None:
    """Why a step was skipped, in words; None of one that was not."""
    if result.skipped == OUTLIER:
        return f"its gradient norm {result.grad_norm:.4g} is {result.grad_norm_ratio:.4g} times the usual one"
    return f"{result.skipped} not finite" if result.skipped else None


@dataclass(frozen=True)
class _Read:
    """The figures of a step on the host; those after `totals` in the order of `_OWN_FIGURES`."""

    totals: Totals
    keys_finite: float
    applied: float
    grad_norm: float
    grad_norm_ratio: float
    pushed: float


_OWN_FIGURES = [field.name for field in fields(_Read)][1:]


def pack(
    *, keys_finite: Tensor, applied: Tensor, grad_norm: Tensor, ratio: Tensor, pushed: Tensor, totals: Tensor
) -> HostCopy:
    """The figures of a step on their way to the host: scalars of any dtype, and the vector of `StepTotals`."""
    own = torch.stack([figure.double() for figure in (keys_finite, applied, grad_norm, ratio, pushed)])
    return HostCopy(torch.cat([own, totals]))

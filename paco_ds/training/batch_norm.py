"""Running statistics of BatchNorm over an optimizer step of M micro-batches, on any number of ranks.

Every micro-batch starts from the statistics before the step; the model gets the mean over the M micro-batches.
Updating them one micro-batch after the other would make the result depend on the number of ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from paco_ds.distributed.ranks import Ranks


class RunningStatistics:
    """Running means and variances of a module's BatchNorm layers during one step.

    Frozen layers (in evaluation mode) are left out."""

    def __init__(self, module: nn.Module) -> None:
        norms = [
            m
            for m in module.modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats and m.training
        ]
        self.buffers: list[Tensor] = [b for m in norms for b in (m.running_mean, m.running_var) if b is not None]
        self.steps: list[Tensor] = [m.num_batches_tracked for m in norms if m.num_batches_tracked is not None]

    def begin_step(self) -> None:
        self._before = [b.clone() for b in self.buffers]
        self._sum = [torch.zeros_like(b) for b in self.buffers]
        self._tracked = [s.clone() for s in self.steps]

    def begin_micro_batch(self) -> None:
        self.restore()

    def end_micro_batch(self) -> None:
        if self.buffers:
            torch._foreach_add_(self._sum, self.buffers)

    def sums(self) -> Tensor:
        """The sums over this rank's micro-batches, flat; after the last one's forward. Empty without layers."""
        return torch.cat([s.flatten() for s in self._sum]) if self.buffers else torch.empty(0)

    def begin_mean(self, sums: Tensor, ranks: Ranks) -> None:
        """Begin the all_reduce of `sums`, in place."""
        if self.buffers:
            self._of_ranks = ranks.begin_sum(sums)

    def finish_step(self, micro_batches: int, step: int) -> None:
        """Give every rank the mean over all micro-batches; `num_batches_tracked` is the step."""
        if not self.buffers:
            return
        mean = self._of_ranks.wait() / micro_batches
        parts = mean.split([b.numel() for b in self.buffers])
        torch._foreach_copy_(self.buffers, [p.view_as(b) for p, b in zip(parts, self.buffers, strict=True)])
        for tracked in self.steps:
            tracked.fill_(step + 1)

    def skip_step(self) -> None:
        """Restore the statistics before the step, after the all_reduce has ended."""
        if self.buffers:
            self._of_ranks.wait()
        self.restore()

    def restore(self) -> None:
        """Restore the statistics before the step."""
        if self.buffers:
            torch._foreach_copy_(self.buffers, self._before)
        for tracked, before in zip(self.steps, self._tracked, strict=True):
            tracked.copy_(before)

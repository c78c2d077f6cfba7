"""Running statistics of BatchNorm over an optimizer step of M micro-batches, on any number of ranks.

Every micro-batch starts from the statistics before the step; the model gets the mean over the M micro-batches.
Updating them one micro-batch after the other would make the result depend on the number of ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from paco_ds.distributed.ranks import Ranks


class RunningStatistics:
    """Running means and variances of a module's BatchNorm layers during one step.

    All lie in one tensor, of which the layers' buffers become views: a step takes a few operations on it, not some on
    each of a hundred layers. Frozen layers (in evaluation mode) are left out.

    Args:
        device: of the module.

    Attributes:
        flat: all means and variances, float32, in the order of the layers; empty without layers.
    """

    def __init__(self, module: nn.Module, device: torch.device | str = "cpu") -> None:
        norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats and m.training]
        self.flat = _as_views(norms, ("running_mean", "running_var"), device)
        self._tracked = _as_views(norms, ("num_batches_tracked",), device)
        # a layer that averages by a momentum counts its batches for nobody: an operation each that the step spares it
        self._counting = [(m, m.num_batches_tracked) for m in norms if m.momentum is not None]
        self._before = torch.empty_like(self.flat)

    def begin_step(self) -> None:
        self._before.copy_(self.flat)
        self._sum: Tensor | None = None
        for norm, _ in self._counting:
            norm.num_batches_tracked = None

    def begin_micro_batch(self) -> None:
        if self._sum is not None:
            self.flat.copy_(self._before)

    def end_micro_batch(self) -> None:
        self._sum = self.flat.clone() if self._sum is None else self._sum.add_(self.flat)

    def sums(self) -> Tensor:
        """The sums over this rank's micro-batches, flat; after the last one's forward. Empty without layers."""
        assert self._sum is not None
        for norm, counted in self._counting:
            norm.num_batches_tracked = counted
        return self._sum

    def begin_mean(self, sums: Tensor, ranks: Ranks) -> None:
        """Begin the all_reduce of `sums`, in place."""
        self._of_ranks = ranks.begin_sum(sums) if len(sums) else None

    def finish_step(self, micro_batches: int, step: int, applied: Tensor) -> None:
        """Give every rank the mean over all micro-batches; `num_batches_tracked` is the step.

        Args:
            applied: a bool scalar on the device; where it is False the statistics before the step are restored.
        """
        if self._of_ranks is None:
            return
        mean = self._of_ranks.wait().div_(micro_batches)
        torch.where(applied, mean, self._before, out=self.flat)
        self._tracked.copy_(torch.where(applied, step + 1, self._tracked))


def _as_views(norms: list[_BatchNorm], names: tuple[str, ...], device: torch.device | str) -> Tensor:
    """These buffers of the layers, joined to one tensor on the device; each becomes a view of its part."""
    owners = [(norm, name) for norm in norms for name in names if getattr(norm, name) is not None]
    buffers: list[Tensor] = [getattr(norm, name) for norm, name in owners]
    if not buffers:
        return torch.empty(0, device=device)
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    parts = flat.split([buffer.numel() for buffer in buffers])
    for (norm, name), buffer, part in zip(owners, buffers, parts, strict=True):
        setattr(norm, name, part.view_as(buffer))
    return flat

"""The mean of the ranks' gradients without ZeRO, where they lie.

DeepSpeed gathers them in buckets, which copies every gradient twice and needs the memory of a bucket; on CPU that takes
as long as the exchange. Here large gradients go out as they are, all at once, and the many small ones share a buffer;
ranks of one host that compute on CPU exchange them through memory that they share.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from paco_ds.distributed.launch import local_world_size
from paco_ds.distributed.ranks import Ranks
from paco_ds.training.shared_memory import NoSharedMemoryError, SharedMemoryMean, shared_bytes

log = logging.getLogger(__name__)

_LARGE = 2**16  # numbers; one collective for each smaller gradient would take longer than its copy


class GradientMean:
    """Replaces gradients by their mean over ranks. Made and called by all ranks together.

    Args:
        timeout: seconds to wait for another rank in shared memory; elsewhere the process group has its own.
        share: whether CPU ranks of one host share memory.

    Attributes:
        shared: through which they exchange gradients; None where gloo or NCCL does.
    """

    def __init__(self, ranks: Ranks, timeout: float, *, share: bool = True) -> None:
        self._ranks = ranks
        self.shared: SharedMemoryMean | None = None
        if share and ranks.device.type == "cpu" and 1 < ranks.world_size == local_world_size():
            try:
                self.shared = SharedMemoryMean(ranks, timeout)
            except NoSharedMemoryError as error:
                if ranks.first:
                    log.warning(
                        "ranks cannot share memory (%s; %d MiB are needed, and a folder for temporary files that all "
                        "see): gradients go through sockets, which takes longer",
                        error,
                        shared_bytes(ranks.world_size) / 2**20,
                    )

    @torch.no_grad()
    def __call__(self, gradients: Sequence[Tensor]) -> None:
        """In place; every rank gives as many gradients, of the same shapes, in the same order."""
        if self._ranks.world_size == 1 or not gradients:
            return
        if self.shared is not None and all(g.dtype == torch.float32 for g in gradients):
            self._through_shared_memory(self.shared, gradients)
        else:
            self._by_collectives(gradients)

    def _through_shared_memory(self, mean: SharedMemoryMean, gradients: Sequence[Tensor]) -> None:
        flat = [g.view(-1) if g.is_contiguous() else g.flatten() for g in gradients]
        mean(flat)
        for gradient, values in zip(gradients, flat, strict=True):
            if not gradient.is_contiguous():
                gradient.copy_(values.view(gradient.shape))

    def _by_collectives(self, gradients: Sequence[Tensor]) -> None:
        large = [g for g in gradients if g.numel() >= _LARGE and g.is_contiguous()]
        small = [g for g in gradients if g.numel() < _LARGE or not g.is_contiguous()]
        buffer = [torch.cat([g.flatten() for g in small])] if small else []
        for pending in self._ranks.begin_sums([*buffer, *large]):
            pending.wait()
        if small:
            parts = buffer[0].split([g.numel() for g in small])
            torch._foreach_copy_(small, [part.view_as(g) for part, g in zip(parts, small, strict=True)])
        torch._foreach_mul_(list(gradients), 1 / self._ranks.world_size)

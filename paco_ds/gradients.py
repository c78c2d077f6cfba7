"""The mean of the ranks' gradients without ZeRO, where they lie.

DeepSpeed gathers them in buckets, which copies every gradient twice and needs the memory of a bucket; on CPU that takes
as long as the exchange. Here large gradients go out as they are, all at once, and the many small ones share a buffer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

_LARGE = 2**16  # numbers; one collective for each smaller gradient would take longer than its copy


@torch.no_grad()
def average(gradients: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Replace gradients by their mean over ranks; every rank gives as many, of the same shapes, in the same order."""
    world_size = dist.get_world_size(group)
    if world_size == 1 or not gradients:
        return
    large = [g for g in gradients if g.numel() >= _LARGE and g.is_contiguous()]
    small = [g for g in gradients if g.numel() < _LARGE or not g.is_contiguous()]
    under_way = [dist.all_reduce(g, group=group, async_op=True) for g in large]
    if small:
        buffer = torch.cat([g.flatten() for g in small])
        dist.all_reduce(buffer, group=group)
        parts = buffer.split([g.numel() for g in small])
        torch._foreach_copy_(small, [part.view_as(g) for part, g in zip(parts, small, strict=True)])
    for work in under_way:
        work.wait()
    torch._foreach_mul_(list(gradients), 1 / world_size)

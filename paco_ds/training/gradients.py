"""The mean of the gradients over ranks, where nothing is partitioned (ZeRO stage 0): in buckets, during backward.

DeepSpeed averages them there after the whole backward, and copies each gradient twice for it, on one rank too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import Parameter

from paco_ds.distributed.ranks import Pending, Ranks

BUCKET_BYTES = 25 * 2**20  # as torch's DistributedDataParallel


class GradientMean:
    """Averages the gradients of the backward between `begin` and `finish`; all ranks call both.

    A bucket is begun when its last gradient is whole, in the order of the buckets, which is the same on all ranks: from
    the last parameters, whose gradients come first, to the first.

    Args:
        dtype: of what is sent. In bfloat16 it is half as much, and a gradient is right to a part in 256.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        ranks: Ranks,
        dtype: torch.dtype = torch.float32,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        # like those that DeepSpeed sends at the other stages, these bytes are not among the step's own
        self._ranks = replace(ranks, on_bytes=lambda op, count: None)
        self._parameters, self._dtype = list(parameters), dtype
        self._buckets = _buckets(parameters, bucket_bytes, dtype.itemsize)
        self._bucket_of = {p: number for number, bucket in enumerate(self._buckets) for p in bucket}
        self._armed = False
        if ranks.world_size > 1:
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(self._is_whole)

    def begin(self) -> None:
        """The backward that follows is the step's last: its gradients are whole."""
        self._armed = True
        self._missing = [len(bucket) for bucket in self._buckets]
        self._sums: list[Pending] = []

    def finish(self) -> None:
        """Give every parameter the mean over all ranks; one without a gradient has 0, as of DeepSpeed."""
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._armed = False
        if self._ranks.world_size == 1:
            return
        self._begin_sums([0] * len(self._buckets))
        for bucket, sums in zip(self._buckets, self._sums, strict=True):
            mean = sums.wait().to(bucket[0].dtype).mul_(1 / self._ranks.world_size)
            for parameter, part in zip(bucket, mean.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = part.view_as(parameter)

    def _is_whole(self, parameter: Tensor) -> None:
        if self._armed:
            self._missing[self._bucket_of[parameter]] -= 1  # type: ignore[index]
            self._begin_sums(self._missing)

    def _begin_sums(self, missing: Sequence[int]) -> None:
        """Begin the sums of the next buckets of which nothing is missing."""
        while (number := len(self._sums)) < len(self._buckets) and not missing[number]:
            gradients = [p.grad.flatten() for p in self._buckets[number] if p.grad is not None]
            self._sums.append(self._ranks.begin_sum(torch.cat(gradients).to(self._dtype)))


def _buckets(parameters: Sequence[Parameter], bucket_bytes: int, item_bytes: int) -> list[list[Parameter]]:
    """The parameters from the last to the first, in lists of at least so many bytes."""
    buckets: list[list[Parameter]] = [[]]
    room = bucket_bytes
    for parameter in reversed(parameters):
        if room <= 0:
            buckets.append([])
            room = bucket_bytes
        buckets[-1].append(parameter)
        room -= parameter.numel() * item_bytes
    return buckets

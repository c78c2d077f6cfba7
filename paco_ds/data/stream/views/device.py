"""Render raw views on a device: both views of a micro-batch at once, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from paco_ds.data.stream.views.device_operations import OPERATIONS
from paco_ds.data.stream.views.device_sampling import sampled
from paco_ds.data.stream.views.raw import RawBatch, concatenated
from paco_ds.data.stream.views.schedule import schedule

_ALIGNED = 8  # bytes: the largest number that is sent


@torch.no_grad()
def render(pixels: Sequence[Tensor], batches: Sequence[RawBatch], size: int, device: torch.device) -> list[Tensor]:
    """Views, uint8 [n, 3, size, size] on the device, for each of several batches of raw views.

    Each pixel depends on its own raw view alone. The host sends all numbers in one copy and reads none.

    Args:
        pixels: of each batch, uint8, the parts one after the other; page-locked if the device is a GPU.
    """
    layers = schedule(concatenated(batches))
    numbers = [array for batch in batches for array in _sampling_numbers(batch)]
    numbers += [array for layer in layers for array in (layer.members, layer.numbers, layer.tables)]
    on_device = iter(_sent(numbers, device))

    def next_three() -> tuple[Tensor, Tensor, Tensor]:
        return next(on_device), next(on_device), next(on_device)

    views = torch.cat(
        [
            sampled(parts.to(device, non_blocking=True), *next_three(), batch.sides, size)
            for parts, batch in zip(pixels, batches, strict=True)
        ]
    )
    for layer in layers:
        members, of_members, tables = next_three()
        operate = OPERATIONS[layer.kind]
        if len(members) == len(views):
            views = operate(views, of_members, tables)
        else:
            views.index_copy_(0, members, operate(views.index_select(0, members), of_members, tables))
    return list(views.split([len(batch) for batch in batches]))


def _sampling_numbers(batch: RawBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First byte, sides and axes of each part, see `sampled`."""
    lengths = 3 * batch.sides.prod(1)
    starts = (np.cumsum(lengths) - lengths).astype(np.int32)
    return starts, batch.sides.astype(np.int32), batch.axes.astype(np.float32)


def _sent(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays on the device, by one copy."""
    ends = np.cumsum([-(-array.nbytes // _ALIGNED) * _ALIGNED for array in arrays])
    buffer = torch.empty(int(ends[-1]), dtype=torch.uint8, pin_memory=device.type == "cuda")
    starts = [0, *ends[:-1].tolist()]
    for start, array in zip(starts, arrays, strict=True):
        buffer[start : start + array.nbytes].numpy()[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = buffer.to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes].view(torch.from_numpy(array[:0]).dtype).view(array.shape)
        for start, array in zip(starts, arrays, strict=True)
    ]

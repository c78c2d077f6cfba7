"""Render raw views on a device, those of a micro-batch at once, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from paco_ds.data.stream.views.device_operations import OPERATIONS
from paco_ds.data.stream.views.device_sampling import sampled
from paco_ds.data.stream.views.raw import RawBatch
from paco_ds.data.stream.views.schedule import schedule

_ALIGNED = 8  # bytes: the largest number that is sent
_DTYPES = {"uint8": torch.uint8, "int32": torch.int32, "int64": torch.int64, "float32": torch.float32}


@torch.no_grad()
def render(pixels: Tensor, batch: RawBatch, size: int, device: torch.device) -> Tensor:
    """Views, uint8 [n, 3, size, size] on the device, of a batch of raw views of any kinds.

    Each pixel depends on its own raw view alone. The host sends all numbers in one copy and reads none.

    Args:
        pixels: uint8, the parts one after the other; page-locked if the device is a GPU.
    """
    layers = schedule(batch)
    lengths = 3 * batch.sides.prod(1)
    starts = (np.cumsum(lengths) - lengths).astype(np.int32)
    numbers = [starts, batch.sides.astype(np.int32), batch.axes.astype(np.float32)]
    numbers += [array for layer in layers for array in (layer.members, layer.numbers, layer.tables)]
    starts_there, sides, axes, *of_layers = _sent(numbers, device)
    there = pixels.to(device, non_blocking=True)
    cubic = not batch.axes[:, :, 2].all()
    views = sampled(there, starts_there, sides, axes, batch.sides, size, cubic=cubic)
    for number, layer in enumerate(layers):
        members, of_members, tables = of_layers[3 * number : 3 * number + 3]
        operate = OPERATIONS[layer.kind]
        if len(members) == len(views):
            views = operate(views, of_members, tables)
        else:
            views.index_copy_(0, members, operate(views.index_select(0, members), of_members, tables))
    return views


def _sent(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays on the device, by one copy."""
    ends = np.cumsum([-(-array.nbytes // _ALIGNED) * _ALIGNED for array in arrays]).tolist()
    buffer = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    here, stretches = buffer.numpy(), [0, *ends[:-1]]
    for start, array in zip(stretches, arrays, strict=True):
        here[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    there = buffer.to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes].view(_DTYPES[array.dtype.name]).view(array.shape)
        for start, array in zip(stretches, arrays, strict=True)
    ]

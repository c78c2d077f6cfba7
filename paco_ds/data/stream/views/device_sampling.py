"""Resample parts of images to views on a device: two products of matrices for a batch, one for each direction.

Weights are integers and so is what lies between the two products. Sums stay below 2^24, so that they are exact in
float32 (and in TF32): the pixels of an image do not depend on its batch, on threads or on the order of a sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_ONE = 2**11  # the weights of a pixel add up to about that
_MOST = 2**25  # values of a chunk of images in float32: 128 MiB, and about as much for each of its places


def sampled(
    pixels: Tensor, starts: Tensor, sides: Tensor, axes: Tensor, lengths: np.ndarray, size: int, *, cubic: bool
) -> Tensor:
    """Views of `size` x `size`, uint8 [n, 3, size, size].

    Args:
        pixels: uint8, all parts one after the other, [H, W, 3] each.
        starts, sides, axes: first byte of each part, int32 [n]; height and width, int32 [n, 2]; first, step and support
            of rows and columns, float32 [n, 2, 3]; see `RawBatch`.
        lengths: `sides` on the host.
        cubic: whether a support is 0.
    """
    chunks = []
    for chunk in _chunks(lengths):
        height, width = lengths[chunk].max(0).tolist()
        parts = _unpacked(pixels, starts[chunk], sides[chunk], height, width)
        weights, sums = _weights(axes[chunk].flatten(0, 1), sides[chunk].flatten(), size, max(height, width), cubic)
        (rows, columns), (row_sums, column_sums) = (t.unflatten(0, (-1, 2)).unbind(1) for t in (weights, sums))
        half = torch.round(torch.bmm(rows[:, :, :height], parts) / row_sums[:, :, None])
        planes = half.view(-1, size, width, 3).permute(0, 3, 1, 2).reshape(-1, 3 * size, width)
        whole = torch.bmm(planes, columns[:, :, :width].transpose(1, 2)) / column_sums[:, None, :]
        chunks.append(whole.round_().clamp_(0, 255).to(torch.uint8).view(-1, 3, size, size))
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


def _chunks(lengths: np.ndarray) -> Iterator[slice]:
    """Consecutive images whose parts fit into a chunk once each has the sides of the largest; one at least."""
    first = 0
    while first < len(lengths):
        largest = np.maximum.accumulate(lengths[first:], axis=0).prod(1) * 3
        fits = int(np.searchsorted(largest * np.arange(1, len(largest) + 1), _MOST, side="right"))
        yield slice(first, first + max(fits, 1))
        first += max(fits, 1)


def _unpacked(pixels: Tensor, starts: Tensor, sides: Tensor, height: int, width: int) -> Tensor:
    """Parts in a row of equal sizes, float32 [n, height, width * 3]; beyond an image its last pixels are repeated."""
    lengths = sides[:, 1] * 3
    row = torch.minimum(count(height, sides.device), sides[:, :1] - 1)
    column = torch.minimum(count(3 * width, sides.device), lengths[:, None] - 1)
    index = (starts[:, None] + row * lengths[:, None])[:, :, None] + column[:, None, :]
    return pixels.index_select(0, index.flatten()).view(index.shape).float()


def _weights(axis: Tensor, lengths: Tensor, size: int, longest: int, cubic: bool) -> tuple[Tensor, Tensor]:
    """Integer weights, float32 [n, size, longest], of a part's rows (or columns) in those of its view, and by what to
    divide."""
    first, step, support = axis[:, :, None].unbind(1)
    centers = count(size, lengths.device) * step + first
    source = count(longest, lengths.device)
    distance = (source - centers[:, :, None]).abs()
    slope = 1 / support.clamp_min(1)
    triangle = (1 - distance * slope[:, :, None]).clamp_min(0)
    # black from outside: such rows have no weight, but for the cubic, where single pixels have none
    seen = (centers > -0.5) & (centers < lengths[:, None] - 0.5)
    weights = triangle * (_ONE * slope * seen)[:, :, None]
    if cubic:
        weights = torch.where(support[:, :, None] > 0, weights, _cubic(distance) * _ONE)
    weights = weights.mul_((source < lengths[:, None])[:, None, :]).round_()
    sums = weights.sum(2).clamp_min_(1)
    return weights, torch.where(support > 0, sums, _ONE) if cubic else sums


def _cubic(distance: Tensor) -> Tensor:
    """Keys' cubic with a = -3/4, OpenCV's."""
    d, a = distance, -0.75
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d < 1, near, torch.where(d < 2, far, 0.0))


def count(end: int, device: torch.device) -> Tensor:
    """0 to end - 1, int32; a part of what is made once."""
    return _counted(1 << (end - 1).bit_length(), device)[:end]


@lru_cache
def _counted(end: int, device: torch.device) -> Tensor:
    return torch.arange(end, dtype=torch.int32, device=device)

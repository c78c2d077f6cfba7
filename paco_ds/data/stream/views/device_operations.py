"""Operations of each kind on many views at once. A function takes uint8 [k, 3, S, S] and gives the same.

Bytes are computed with in integers, so that the pixels of an image are the same whatever its batch and device; only
affine transforms interpolate in float32. Nothing is read by the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from paco_ds.data.stream.views.color import LUMA
from paco_ds.data.stream.views.device_sampling import count
from paco_ds.data.stream.views.instructions import BLUR_ONE, ONE, Kind

Operate = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(images uint8 [k, 3, S, S], numbers float32 [k, P], tables uint8 [k, 256]) to images."""

_KEEP = ONE // 1000  # as in `instructions`: truncation keeps integers
_LUMA = [round(weight * ONE) for weight in LUMA.tolist()]
_SMOOTH = (1, 1, 1, 1, 5, 1, 1, 1, 1)


def _flip(images: Tensor, numbers: Tensor, tables: Tensor) -> Tensor:
    return images.flip(3)


def _table(images: Tensor, numbers: Tensor, tables: Tensor) -> Tensor:
    return tables.gather(1, images.flatten(1).long()).view(images.shape)


def _matrix(images: Tensor, numbers: Tensor, tables: Tensor) -> Tensor:
    """numbers: 3 x 3 factors, row by row, an offset for all, and what of the image's mean gray is added to that.

    In float64, in which integers of this size are exact.
    """
    values, scaled = images.flatten(2).double(), numbers.double() / ONE
    pixels = values.shape[2] * ONE
    gray = torch.floor((values.sum(2) @ _luma(images.device) + pixels // 2) / pixels)
    offset = torch.addcmul(scaled[:, 9], scaled[:, 10], gray)
    mixed = torch.baddbmm(offset[:, None, None], scaled[:, :9].view(-1, 3, 3), values)
    return mixed.clamp_(0, 255).to(torch.uint8).view(images.shape)


@lru_cache
def _luma(device: torch.device) -> Tensor:
    return torch.tensor(_LUMA, dtype=torch.float64).to(device)


def _auto_contrast(images: Tensor, numbers: Tensor, tables: Tensor) -> Tensor:
    low, high = images.flatten(2).aminmax(dim=2, keepdim=True)
    low, spread, levels = low.int(), high.int() - low.int(), _levels(images)
    stretched = torch.div((levels - low) * 255, spread.clamp_min(1), rounding_mode="floor").clamp(0, 255)
    return _by_channel(images, torch.where(spread > 0, stretched, levels))


def _equalize(images: Tensor, numbers: Tensor, tables: Tensor) -> Tensor:
    counts, levels = _histograms(images), _levels(images)
    below = counts.cumsum(2) - counts
    last = torch.where(counts > 0, levels, 0).amax(2, keepdim=True)
    step = torch.div(images.shape[2] * images.shape[3] - counts.gather(2, last.long()), 255, rounding_mode="floor")
    half = torch.div(step, 2, rounding_mode="floor")
    equal = torch.div(half + below, step.clamp_min(1), rounding_mode="floor").clamp(0, 255)
    return _by_channel(images, torch.where(step > 0, equal, levels))


def _histograms(images: Tensor) -> Tensor:
    """Pixels of each value, int64 [k, 3, 256]."""
    values = images.flatten(2).long()
    counts = torch.zeros(*values.shape[:2], 256, dtype=torch.int64, device=images.device)
    return counts.scatter_add_(2, values, torch.ones((), dtype=torch.int64, device=images.device).expand_as(values))


def _levels(images: Tensor) -> Tensor:
    return count(256, images.device)


def _by_channel(images: Tensor, tables: Tensor) -> Tensor:
    """tables: [k, 3, 256]."""
    return tables.to(torch.uint8).gather(2, images.flatten(2).long()).view(images.shape)


def _hue(images: Tensor, numbers: Tensor, tables: Tensor) -> Tensor:
    """numbers: shift in 256ths of the color circle. Hue and saturation are rounded to bytes between, as in OpenCV."""
    red, green, blue = images.float().unbind(1)
    value, low = torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)
    spread = value - low
    sixth = torch.where(
        value == red,
        green - blue,
        torch.where(value == green, blue - red + 2 * spread, red - green + 4 * spread),
    )
    turn = torch.round(sixth * 256 / (6 * spread).clamp_min(1)) + numbers[:, :1, None]
    saturation = torch.round(spread * 255 / value.clamp_min(1)) / 255
    # OpenCV counts 256 hues but takes 255 for the whole circle on the way back
    # red, green and blue lie 5, 3 and 1 sixths of the circle before the color at which they are least
    place = turn.remainder(256)[:, None] * 6 / 255 + (5 - 2 * torch.arange(3, device=images.device)).view(3, 1, 1)
    place = place.remainder(6)
    share = torch.minimum(place, 4 - place).clamp(0, 1)
    return (value[:, None] - (value * saturation)[:, None] * share).round_().to(torch.uint8)


def _blur(images: Tensor, numbers: Tensor, tables: Tensor) -> Tensor:
    """numbers: integer weights from the center outwards. Pixels of the edge are repeated beyond it."""
    reach = numbers.shape[1] - 1
    weights = torch.cat([numbers[:, 1:].flip(1), numbers], 1).repeat_interleave(3, 0)
    planes = images.flatten(0, 1).float()[None]
    planes = functional.pad(planes, (reach, reach, reach, reach), mode="replicate")
    planes = functional.conv2d(planes, weights[:, None, None, :], groups=len(weights))
    planes = functional.conv2d(planes, weights[:, None, :, None], groups=len(weights))
    return (planes / BLUR_ONE**2).round_().to(torch.uint8).view(images.shape)


def _sharpness(images: Tensor, numbers: Tensor, tables: Tensor) -> Tensor:
    """numbers: the factor. Pixels of the edge stay."""
    if min(images.shape[2:]) < 3:
        return images
    weights = torch.ones(1, 1, 3, 3, device=images.device)
    weights[:, :, 1, 1] = 5
    sums = functional.conv2d(images.flatten(0, 1).float()[:, None], weights).view(*images.shape[:2], -1)
    smooth = torch.round(sums / weights.sum()).int()
    inner = images[:, :, 1:-1, 1:-1]
    factor = numbers[:, 0, None, None].int()
    sharp = smooth * (ONE - factor) + inner.flatten(2).int() * factor + _KEEP
    result = images.clone()
    result[:, :, 1:-1, 1:-1] = _bytes(sharp).view(inner.shape)
    return result


def _affine(mode: str) -> Operate:
    def affine(images: Tensor, numbers: Tensor, tables: Tensor) -> Tensor:
        """numbers: 2 x 3 of the transform, row by row, in the units of grid_sample, and the color of what comes from
        outside."""
        grid = _grid(images.shape[3], images.device) @ numbers[:, :6].view(-1, 2, 3).transpose(1, 2)
        color = numbers[:, 6:9, None, None]
        # outside is 0, so that at the edge pixels and the color mix as in OpenCV
        grid = grid.unflatten(1, images.shape[2:])
        moved = functional.grid_sample(images.float() - color, grid, mode, "zeros", align_corners=False)
        return moved.add_(color).round_().clamp_(0, 255).to(torch.uint8)

    return affine


@lru_cache
def _grid(side: int, device: torch.device) -> Tensor:
    """Centers of pixels, row by row, x, y and 1, float32 [side^2, 3], between -1 and 1 at the edges."""
    axis = (torch.arange(side, dtype=torch.float32) * 2 + 1) / side - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)], 2).view(-1, 3).to(device)


def _cutout(images: Tensor, numbers: Tensor, tables: Tensor) -> Tensor:
    """numbers: top, bottom, left, right."""
    top, bottom, left, right = numbers[:, :4, None, None].unbind(1)
    row, column = count(images.shape[2], images.device)[:, None], count(images.shape[3], images.device)
    inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
    return images.masked_fill(inside[:, None], 0)


def _bytes(values: Tensor) -> Tensor:
    """Integers in 65536ths, truncated."""
    return (values >> 16).clamp_(0, 255).to(torch.uint8)


OPERATIONS: Mapping[Kind, Operate] = {
    Kind.FLIP: _flip,
    Kind.TABLE: _table,
    Kind.MATRIX: _matrix,
    Kind.CUTOUT: _cutout,
    Kind.NEAREST: _affine("nearest"),
    Kind.BILINEAR: _affine("bilinear"),
    Kind.BICUBIC: _affine("bicubic"),
    Kind.SHARPNESS: _sharpness,
    Kind.HUE: _hue,
    Kind.BLUR: _blur,
    Kind.AUTO_CONTRAST: _auto_contrast,
    Kind.EQUALIZE: _equalize,
}

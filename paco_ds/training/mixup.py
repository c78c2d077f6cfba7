"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019): images of a micro-batch mixed in pairs, as a function of
seed, step and micro-batch.

With x, y images and labels, x', y' those of partners drawn in the same micro-batch, and lambda ~ Beta(alpha, alpha),
one number for the micro-batch::

    image = lambda x + (1 - lambda) x'          loss = lambda L(y) + (1 - lambda) L(y')

CutMix puts a rectangle of x' into x in place of the mean; lambda is then the share of x's pixels that stay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from paco_ds.distributed.ranks import to_device
from paco_ds.losses.base import LossOutput
from paco_ds.randomness import DrawPurpose, generator, permutation


@dataclass(frozen=True)
class Mix:
    """How one micro-batch is mixed.

    Attributes:
        share: lambda.
        partners: int64 [B], the image that each is mixed with.
        cut: rows and columns that come from the partner; None: the whole is mixed.
    """

    share: float
    partners: Tensor
    cut: tuple[slice, slice] | None = None

    def images(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] to mixed ones in float32, of the same range; uint8 where a rectangle is cut."""
        if self.cut is not None:
            mixed, (rows, columns) = images.clone(), self.cut
            mixed[..., rows, columns] = images[to_device(self.partners, images.device)][..., rows, columns]
            return mixed
        return torch.lerp(images[to_device(self.partners, images.device)].float(), images.float(), self.share)

    def outputs(self, own: LossOutput, partners: LossOutput) -> LossOutput:
        """The loss of the mix from that with the own labels and that with the partners'.

        An image of two classes has no own center, so the probabilities are left out.
        """
        parts = {name: self._mix(part, partners.parts[name]) for name, part in own.parts.items()}
        return LossOutput(self._mix(own.loss, partners.loss), parts=parts)

    def _mix(self, own: Tensor, partners: Tensor) -> Tensor:
        return self.share * own + (1 - self.share) * partners


@dataclass(frozen=True)
class Mixup:
    """Draws the mixes of a run.

    Args:
        alpha: above 0; small values leave most images nearly as they are.
        seed: the recipe's.
    """

    alpha: float
    seed: int

    def draw(self, step: int, micro_batch: int, size: int) -> Mix:
        """The mix of a micro-batch, the same on whichever rank, whenever it is asked for."""
        key = self.seed, step, micro_batch
        share = float(generator(DrawPurpose.MIXUP, *key, 0).beta(self.alpha, self.alpha))
        return Mix(share, torch.from_numpy(permutation(size, DrawPurpose.MIXUP, *key, 1)))


@dataclass(frozen=True)
class CutMix:
    """Draws the rectangles of a run: sides sqrt(1 - lambda) of the image's, centered anywhere, clipped at its edges.

    Args:
        alpha: above 0, of lambda's Beta(alpha, alpha); 1 as published.
        seed: the recipe's.
        side: of the images, pixels.
    """

    alpha: float
    seed: int
    side: int

    def draw(self, step: int, micro_batch: int, size: int) -> Mix:
        """As :meth:`Mixup.draw`."""
        key = self.seed, step, micro_batch
        rng = generator(DrawPurpose.MIXUP, *key, 0)
        half = math.sqrt(1 - rng.beta(self.alpha, self.alpha)) * self.side / 2
        rows, columns = (self._clipped(rng.random() * self.side, half) for _ in range(2))
        cut = (rows.stop - rows.start) * (columns.stop - columns.start)
        partners = torch.from_numpy(permutation(size, DrawPurpose.MIXUP, *key, 1))
        return Mix(1 - cut / self.side**2, partners, (rows, columns))

    def _clipped(self, center: float, half: float) -> slice:
        return slice(max(round(center - half), 0), min(round(center + half), self.side))

"""The key encoder: its momentum, its moving average, and the keys of the global batch on every rank.

Shapes: G global batch, m micro-batch, M micro-batches, W ranks, A = M / W, D dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from paco_ds.config.recipe import KeyEncoderSettings
from paco_ds.contrast.key_exchange import key_exchange, key_groups
from paco_ds.distributed.ranks import MicroBatchLayout, Pending, Ranks, to_device
from paco_ds.distributed.zero import move_average
from paco_ds.errors import RecipeError
from paco_ds.randomness import DrawPurpose, seed_torch


@dataclass(frozen=True)
class Keys:
    """Keys of a step in slot order, the same on every rank: `keys_GD` float32 unit rows, `labels_G` int64.

    `finite` is a bool scalar on the device: False if any rank made a key that is not finite.
    """

    keys_GD: Tensor
    labels_G: Tensor
    finite: Tensor


class PendingImages:
    """Images of global step `step` in flight to the ranks that make their keys; `groups` as in `gather_keys`."""

    def __init__(
        self, step: int, groups: np.ndarray, arriving: Pending, in_group_order: np.ndarray | None = None
    ) -> None:
        self.step, self.groups = step, groups
        self._arriving, self._in_group_order = arriving, in_group_order

    def take(self) -> Tensor:
        """The images of this rank's groups, [A m, 3, H, W] in group order. Call it once: the buffer is freed."""
        images = self._arriving.wait()
        del self._arriving
        if self._in_group_order is None:
            return images
        return images[to_device(torch.from_numpy(self._in_group_order), images.device)]


class PendingKeys:
    """Keys being gathered: ranks wait for each other where keys are needed, not where they are made."""

    def __init__(self, gathered: Pending, unpack: Callable[[Tensor], Keys]) -> None:
        self._gathered, self._unpack = gathered, unpack

    def wait(self) -> Keys:
        """The keys of all ranks; later calls return the same."""
        return self._keys

    @cached_property
    def _keys(self) -> Keys:
        return self._unpack(self._gathered.wait())


def key_momentum(settings: KeyEncoderSettings, step: int, total_steps: int, scale: float = 1.0) -> float:
    """Momentum of a step (from 0): a function of the step alone, so that a resumed run needs no state of it.

    With `scale_momentum` the recipe's m becomes m^scale, so that the average is as long in images whatever the
    global batch (Busbridge et al. 2023, "How to Scale Your EMA"). The cosine schedule rises from there to 1:
    1 - (1 - m) (cos(pi step / total_steps) + 1) / 2 (Grill et al. 2020, BYOL).

    Args:
        scale: G / G_ref, the global batch over the one that m was chosen for.
    """
    momentum = settings.momentum**scale if settings.scale_momentum else settings.momentum
    if settings.momentum_schedule == "constant":
        return momentum
    return 1 - (1 - momentum) * (math.cos(math.pi * step / total_steps) + 1) / 2


def groups_of_keys(settings: KeyEncoderSettings, key_encoder: nn.Module) -> Literal["shuffle", "local"]:
    """What `key_encoder.batch_norm` is for this key encoder: of `auto`, shuffle where it has BatchNorm.

    Raises:
        RecipeError: shuffle without BatchNorm, which would send images to other ranks without any use.
    """
    normalises = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in key_encoder.modules())
    if settings.batch_norm == "auto":
        return "shuffle" if normalises else "local"
    if settings.batch_norm == "shuffle" and not normalises:
        raise RecipeError(
            "key_encoder.batch_norm shuffle: neither backbone nor projection has BatchNorm, so no query can find its "
            "key by shared statistics, and exchanging images would have no use; set it to auto or local"
        )
    return settings.batch_norm


class KeyEncoder:
    """Follows the query encoder and makes keys (He et al. 2020), exactly at any ZeRO stage and number of ranks.

    Args:
        momentum: m of key <- m key + (1 - m) query: a number, or a function of the step.
        batch_norm: "shuffle" normalises keys over groups of m drawn from the whole global batch by (seed, step),
            so that a query cannot find its key by shared statistics; "local" over the micro-batches themselves.
        shuffle_block: micro-batches whose images are shuffled among themselves; None: all of a step.
    """

    def __init__(
        self,
        engine: Any,
        layout: MicroBatchLayout,
        ranks: Ranks,
        *,
        momentum: float | Callable[[int], float],
        batch_norm: Literal["shuffle", "local"],
        seed: int,
        shuffle_block: int | None = None,
    ) -> None:
        self.engine, self.layout, self.ranks = engine, layout, ranks
        self.momentum: Callable[[int], float] = momentum if callable(momentum) else lambda step: momentum
        self.batch_norm, self.seed, self.shuffle_block = batch_norm, seed, shuffle_block
        model = engine.module
        queries = dict(model.query_encoder.named_parameters())
        # what is frozen has been equal since the start
        followed = [(p, queries[n]) for n, p in model.key_encoder.named_parameters() if queries[n].requires_grad]
        self._key, self._query = [key for key, _ in followed], [query for _, query in followed]

    @property
    def exchanges(self) -> bool:
        """Whether images are exchanged between ranks."""
        return self.batch_norm == "shuffle" and self.layout.world_size > 1

    def update(self, step: int) -> None:
        """key <- momentum key + (1 - momentum) query; once per optimizer step, before its keys are made."""
        move_average(self.engine, self._key, self._query, 1 - self.momentum(step))

    def begin_exchange(self, step: int, views: Sequence[Tensor]) -> PendingImages:
        """Begin to send each image to the rank that runs its group, at most once.

        Counts follow from the permutation; no size exchange is needed. The exchange depends on the step number
        alone, so it can overlap with the step before.

        Args:
            views: key views of this rank's A micro-batches of global step `step`, uint8 [m, 3, H, W] each, on any
                device.
        """
        images, groups = torch.cat(list(views)), self._groups(step)
        if self.batch_norm == "local":
            return PendingImages(step, groups, Pending(images))
        exchange = key_exchange(groups, self.layout)
        order = torch.from_numpy(exchange.rows)
        if images.is_cuda:  # views rendered there
            rows = images.index_select(0, to_device(order, images.device))
        else:
            # page-locked where there is a GPU, so that the host does not wait for it
            rows = torch.empty(images.shape, dtype=images.dtype, pin_memory=torch.cuda.is_available())
            torch.index_select(images, 0, order, out=rows)
            rows = rows.to(self.ranks.device, non_blocking=True)
        arriving = self.ranks.begin_exchange(
            rows, exchange.send, exchange.receive, among_peers=self.shuffle_block is not None
        )
        return PendingImages(step, groups, arriving, exchange.in_group_order)

    def keys(self, step: int, images: PendingImages, labels: Sequence[Tensor]) -> PendingKeys:
        """Make this rank's share of the keys of the global batch, and begin to gather them all.

        Args:
            images: what `begin_exchange` gave for this step; they are consumed.
            labels: classes of this rank's A micro-batches, int64 [m] each.

        Raises:
            ValueError: images of another step, which would be given the labels of this one.
        """
        if images.step != step:
            raise ValueError(f"images of step {images.step} where keys of step {step} are made")
        keys = []
        for number, group in zip(self.layout.own, images.take().split(self.layout.micro_batch), strict=True):
            seed_torch(DrawPurpose.KEY_DROPOUT, self.seed, step, number)
            keys.append(self._encode(group))
        return gather_keys(self.layout, self.ranks, torch.cat(keys), torch.cat(list(labels)), images.groups)

    def _groups(self, step: int) -> np.ndarray:
        """Slots of each group, [M, m]: group g is normalised together, by rank g mod W."""
        if self.batch_norm == "shuffle":
            return key_groups(self.layout, self.shuffle_block, self.seed, step)
        return np.arange(self.layout.global_batch).reshape(-1, self.layout.micro_batch)

    def _encode(self, images: Tensor) -> Tensor:
        keys: Tensor = self.engine(to_device(images, self.ranks.device), keys=True)
        return keys


def gather_keys(
    layout: MicroBatchLayout, ranks: Ranks, keys: Tensor, labels: Tensor, groups: np.ndarray | None = None
) -> PendingKeys:
    """Keys of the global batch, by one collective: keys, labels and a finite flag, as the bits of float32.

    Args:
        keys: of this rank's A groups, float32 [A m, D], without gradient.
        labels: classes of this rank's A micro-batches, int64 [A m].
        groups: slots of each group, [M, m]; by default its micro-batch's own.
    """
    rows, dim = keys.shape
    packed = torch.cat(
        [
            keys.flatten(),
            to_device(labels.int(), keys.device).view(torch.float32),
            (torch.linalg.vector_norm(keys) < math.inf).float()[None],  # nan is not
        ]
    )

    def unpack(gathered: Tensor) -> Keys:
        keys_GD = layout.global_order(gathered[:, : rows * dim].reshape(-1, rows, dim))
        lane_labels = gathered[:, rows * dim : -1].contiguous().view(torch.int32)
        if groups is not None:
            keys_GD = keys_GD[to_device(torch.from_numpy(np.argsort(groups.ravel())), keys.device)]
        return Keys(
            keys_GD=keys_GD,
            labels_G=layout.global_order(lane_labels).long(),
            finite=gathered[:, -1].all(),
        )

    return PendingKeys(ranks.begin_gather(packed), unpack)

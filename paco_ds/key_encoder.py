"""The key encoder at work: its moving average, and the keys of the whole global batch on every rank.

Shapes: G global batch, m micro-batch, M micro-batches, W ranks, A = M / W, D dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from paco_ds.distributed import MicroBatchLayout, Ranks
from paco_ds.key_exchange import key_exchange
from paco_ds.randomness import Stream, permutation
from paco_ds.zero import move_average


@dataclass(frozen=True)
class Keys:
    """Keys of a step in lane order, the same on every rank: `keys_GD` float32 unit rows, `labels_G` int64.

    `finite` is False if any rank made a key that is not finite.
    """

    keys_GD: Tensor
    labels_G: Tensor
    finite: bool


class KeyEncoder:
    """Follows the query encoder and makes keys (He et al. 2020), exactly at any ZeRO stage and number of ranks.

    Args:
        momentum: share of its own weights the key encoder keeps in each step.
        batch_norm: "shuffle" normalises keys over groups of m drawn from the whole global batch by (seed, step),
            so that a query cannot find its key by shared statistics; "local" over the micro-batches themselves.
    """

    def __init__(
        self,
        engine: Any,
        layout: MicroBatchLayout,
        ranks: Ranks,
        *,
        momentum: float,
        batch_norm: Literal["shuffle", "local"],
        seed: int,
    ) -> None:
        self.engine, self.layout, self.ranks = engine, layout, ranks
        self.momentum, self.batch_norm, self.seed = momentum, batch_norm, seed
        model = engine.module
        queries = dict(model.query_encoder.named_parameters())
        self._key = [p for _, p in model.key_encoder.named_parameters()]
        self._query = [queries[name] for name, _ in model.key_encoder.named_parameters()]

    def update(self) -> None:
        """key <- momentum key + (1 - momentum) query; once per optimizer step, before its keys are made."""
        move_average(self.engine, self._key, self._query, 1 - self.momentum)

    def keys(self, step: int, views: Sequence[Tensor], labels: Sequence[Tensor]) -> Keys:
        """Keys of the global batch.

        Args:
            views: key views of this rank's A micro-batches, uint8 [m, 3, H, W] each, on any device.
            labels: their classes, int64 [m] each.
        """
        groups = self._groups(step)
        mine = self._exchange_images(torch.cat(list(views)), groups)
        keys = torch.cat([self._encode(images) for images in mine.split(self.layout.micro_batch)])
        return self._collect(keys, torch.cat(list(labels)), groups)

    def _groups(self, step: int) -> np.ndarray:
        """Lanes of each group, [M, m]: group g is normalised together, by rank g mod W."""
        layout = self.layout
        lanes = np.arange(layout.global_batch)
        if self.batch_norm == "shuffle":
            lanes = permutation(len(lanes), Stream.KEY_GROUPS, self.seed, step)
        return lanes.reshape(layout.micro_batches, layout.micro_batch)

    def _exchange_images(self, images: Tensor, groups: np.ndarray) -> Tensor:
        """Each image to the rank that runs its group, at most once: [A m, ...] -> [A m, ...] in group order.

        Who sends what follows from the permutation, so no sizes are exchanged.
        """
        layout, ranks = self.layout, self.ranks
        if self.batch_norm == "local":
            return images
        exchange = key_exchange(groups, layout)
        rows = images[torch.from_numpy(exchange.rows)]
        arrived = ranks.exchange(rows.to(ranks.device), exchange.send, exchange.receive)
        return arrived[torch.from_numpy(exchange.in_group_order).to(arrived.device)]

    def _encode(self, images: Tensor) -> Tensor:
        keys: Tensor = self.engine(images.to(self.ranks.device, non_blocking=True), keys=True)
        return keys

    def _collect(self, keys: Tensor, labels: Tensor, groups: np.ndarray) -> Keys:
        """One collective: keys of my groups, labels of my lanes and a finite flag, as the bits of float32."""
        layout = self.layout
        rows, dim = keys.shape
        packed = torch.cat(
            [
                keys.flatten(),
                labels.to(keys.device, torch.int32).view(torch.float32),
                torch.isfinite(keys).all().float()[None],
            ]
        )
        gathered = self.ranks.gather(packed)
        shuffled = layout.global_order(gathered[:, : rows * dim].reshape(-1, rows, dim))
        lane_labels = gathered[:, rows * dim : -1].contiguous().view(torch.int32)
        in_lane_order = torch.from_numpy(np.argsort(groups.ravel())).to(keys.device)
        return Keys(
            keys_GD=shuffled[in_lane_order],
            labels_G=layout.global_order(lane_labels).long(),
            finite=bool(gathered[:, -1].all()),
        )

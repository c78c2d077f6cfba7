"""Who sends which image to whom when keys are normalised over shuffled groups: arithmetic, no communication.

Shapes: G global batch, m micro-batch, M micro-batches, W ranks, A = M / W.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paco_ds.distributed.ranks import MicroBatchLayout


@dataclass(frozen=True)
class KeyExchange:
    """A rank's part of the exchange.

    Attributes:
        rows: of the rank's own A m images, in the order they are sent: by receiver, then in the receiver's order.
        send: [W] how many of them go to each rank, itself included.
        receive: [W] how many images come from each rank, itself included.
        in_group_order: [A m] where, among the images as they arrive (by sender), each of the rank's groups' is.
    """

    rows: np.ndarray
    send: list[int]
    receive: list[int]
    in_group_order: np.ndarray


def key_exchange(groups: np.ndarray, layout: MicroBatchLayout) -> KeyExchange:
    """The exchange that brings every image to the rank that runs its group, each at most once.

    Everybody computes it from the permutation, so no sizes are exchanged. O(G), whatever the number of ranks.

    Args:
        groups: [M, m] slots of each group; group g is run by rank g mod W.
    """
    m, W, A = layout.micro_batch, layout.world_size, layout.accumulation
    by_receiver = groups.reshape(A, W, m).swapaxes(0, 1).reshape(W, A * m)
    mine = by_receiver // m % W == layout.rank
    slots = by_receiver[mine]
    source = by_receiver[layout.rank] // m % W
    # images arrive by sender, within one in group order: the inverse of a stable sort by sender
    in_group_order = np.empty(A * m, dtype=np.int64)
    in_group_order[np.argsort(source, kind="stable")] = np.arange(A * m)
    return KeyExchange(
        rows=slots // m // W * m + slots % m,
        send=mine.sum(1).tolist(),
        receive=np.bincount(source, minlength=W).tolist(),
        in_group_order=in_group_order,
    )

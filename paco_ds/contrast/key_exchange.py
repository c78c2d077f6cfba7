"""The all-to-all plan of ShuffleBN: row order and send/receive counts, computed without communication.

Shapes: G global batch, m micro-batch, M micro-batches, W ranks, A = M / W.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paco_ds.distributed.ranks import MicroBatchLayout


@dataclass(frozen=True)
class KeyExchange:
    """A rank's part of the all-to-all.

    Attributes:
        rows: order in which the rank's A m images are sent: by receiver, then in the receiver's order.
        send: [W] number of images sent to each rank, itself included.
        receive: [W] number of images received from each rank, itself included.
        in_group_order: [A m] indices that sort the received images (by sender) into group order.
    """

    rows: np.ndarray
    send: list[int]
    receive: list[int]
    in_group_order: np.ndarray


def key_exchange(groups: np.ndarray, layout: MicroBatchLayout) -> KeyExchange:
    """The all-to-all that sends every image to the rank of its group, at most once.

    Every rank computes it from the permutation, so no sizes are exchanged. O(G) for any number of ranks.

    Args:
        groups: [M, m] batch slots of each group; rank g mod W runs group g.
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

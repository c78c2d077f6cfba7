"""ShuffleBN's groups, and the plan of their exchange: row order and send/receive counts, without communication.

Shapes: G global batch, m micro-batch, M micro-batches, W ranks, A = M / W.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paco_ds.distributed.ranks import MicroBatchLayout
from paco_ds.randomness import DrawPurpose, permutation


def key_groups(layout: MicroBatchLayout, block: int | None, seed: int, step: int) -> np.ndarray:
    """Batch slots of each group, int64 [M, m]: group g is normalised together, by rank g mod W.

    A permutation of the step's slots that depends on (seed, step) alone, not on the number of ranks. With blocks,
    groups b to b + N - 1 share the slots of micro-batches b to b + N - 1, for b = 0, N, 2N ...

    Args:
        block: N, which divides M; None: all M.
    """
    M, m = layout.micro_batches, layout.micro_batch
    if block is None or block == M:
        return permutation(M * m, DrawPurpose.KEY_GROUPS, seed, step).reshape(M, m)
    length = block * m
    blocks = [
        first + permutation(length, DrawPurpose.KEY_GROUPS, seed, step, first) for first in range(0, M * m, length)
    ]
    return np.concatenate(blocks).reshape(M, m)


def exchange_peers(layout: MicroBatchLayout, block: int | None) -> set[int]:
    """The other ranks that this rank exchanges images with: those that run micro-batches of its blocks."""
    M, W, N = layout.micro_batches, layout.world_size, block or layout.micro_batches
    blocks = {j // N for j in layout.own}
    return {j % W for b in blocks for j in range(b * N, min((b + 1) * N, M))} - {layout.rank}


@dataclass(frozen=True)
class KeyExchange:
    """A rank's part of the exchange.

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

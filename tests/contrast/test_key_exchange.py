"""The exchange of key images: the same as looping over ranks, and quick at a thousand of them."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from paco_ds.contrast.key_encoder import KeyEncoder
from paco_ds.contrast.key_exchange import exchange_peers, key_exchange, key_groups
from paco_ds.distributed.ranks import MicroBatchLayout, Pending
from paco_ds.randomness import DrawPurpose, permutation


def shuffled(M, m, step=0):
    return permutation(M * m, DrawPurpose.KEY_GROUPS, 3, step).reshape(M, m)


def looped(groups, layout):
    """Rank by rank, as plainly as it can be said."""
    m, W = layout.micro_batch, layout.world_size
    of_rank = [
        [slot for j in range(r, layout.micro_batches, W) for slot in range(j * m, (j + 1) * m)] for r in range(W)
    ]
    owner = {slot: r for r, slots in enumerate(of_rank) for slot in slots}
    wanted = [[int(slot) for g in range(r, layout.micro_batches, W) for slot in groups[g]] for r in range(W)]
    outgoing = [[slot for slot in slots if owner[slot] == layout.rank] for slots in wanted]
    rows = [of_rank[layout.rank].index(slot) for slots in outgoing for slot in slots]
    source = [owner[slot] for slot in wanted[layout.rank]]
    return rows, [len(slots) for slots in outgoing], [source.count(r) for r in range(W)]


@pytest.mark.parametrize(("W", "M", "m"), [(1, 3, 2), (2, 4, 3), (3, 6, 5), (4, 4, 8), (6, 12, 1)])
def test_rows_and_sizes_are_those_of_a_loop_over_ranks(W, M, m):
    """Every rank of several layouts, accumulation included."""
    groups = shuffled(M, m)
    for rank in range(W):
        layout = MicroBatchLayout(m, M, rank, W)
        exchange = key_exchange(groups, layout)
        assert (exchange.rows.tolist(), exchange.send, exchange.receive) == looped(groups, layout)


@pytest.mark.parametrize(("W", "M", "m"), [(1, 3, 2), (2, 4, 3), (4, 8, 5)])
def test_every_image_ends_in_its_group(W, M, m):
    """The key encoder's exchange, played without ranks: images named by their slot arrive in group order."""
    groups = shuffled(M, m, step=1)
    layouts = [MicroBatchLayout(m, M, rank, W) for rank in range(W)]
    own = [torch.tensor([slot for j in layout.own for slot in layout.slots(j)]) for layout in layouts]
    parts = []
    for layout, slots in zip(layouts, own, strict=True):
        exchange = key_exchange(groups, layout)
        parts.append(slots[torch.from_numpy(exchange.rows)].split(exchange.send))
    for layout in layouts:
        arriving = torch.cat([part[layout.rank] for part in parts])

        def exchange_rows(rows, send, receive, among_peers, arriving=arriving, W=W):
            assert not among_peers
            assert sum(receive) == len(arriving)
            assert len(send) == W
            return Pending(arriving)

        encoder = KeyEncoder.__new__(KeyEncoder)
        encoder.layout, encoder.batch_norm, encoder.seed = layout, "shuffle", 3
        encoder.shuffle_block = None
        ranks: Any = SimpleNamespace(device="cpu", begin_exchange=exchange_rows)
        encoder.ranks = ranks
        arrived = encoder.begin_exchange(1, own[layout.rank].split(m)).take()
        np.testing.assert_array_equal(arrived.numpy(), groups[layout.rank :: W].ravel())


def test_images_of_another_step_are_refused():
    """Else every key would be given another image's label."""
    encoder = KeyEncoder.__new__(KeyEncoder)
    encoder.layout, encoder.batch_norm = MicroBatchLayout(2, 1, 0, 1), "local"
    images = encoder.begin_exchange(3, [torch.zeros(2, 3, 4, 4)])
    with pytest.raises(ValueError, match="images of step 3 where keys of step 4 are made"):
        encoder.keys(4, images, [torch.zeros(2)])


def test_groups_of_a_block_have_the_images_of_its_micro_batches():
    """A permutation within each, another in every block and step; null and one block of all are the published one."""
    layout = MicroBatchLayout(5, 12, 0, 1)
    groups = key_groups(layout, 4, seed=3, step=1)
    for first in range(0, 12, 4):
        assert sorted(groups[first : first + 4].ravel()) == list(range(first * 5, (first + 4) * 5))
    orders = {tuple(groups[first : first + 4].ravel() - first * 5) for first in (0, 4, 8)}
    assert len(orders | {tuple(key_groups(layout, 4, 3, 2)[:4].ravel())}) == 4
    for block in (None, 12):
        np.testing.assert_array_equal(key_groups(layout, block, 3, 1), shuffled(12, 5, step=1))


@pytest.mark.parametrize(
    ("ranks", "block", "micro_batches", "peers", "leaves"),
    [
        pytest.param(16, 4, 16, 3, False, id="a block is a node"),
        pytest.param(16, 4, 48, 3, False, id="accumulation: the same node at every turn"),
        pytest.param(16, 2, 16, 1, False, id="half a node"),
        pytest.param(16, 8, 16, 7, True, id="two nodes"),
        pytest.param(12, 8, 24, 7, True, id="ranks are no multiple of the block"),
        pytest.param(16, None, 16, 15, True, id="published"),
    ],
)
def test_no_image_leaves_a_node_whose_ranks_are_a_block(ranks, block, micro_batches, peers, leaves):
    """Nodes of 4 ranks, images counted over five steps; only ranks of one block are ever connected."""
    left = 0
    for rank in range(ranks):
        layout = MicroBatchLayout(8, micro_batches, rank, ranks)
        met = set()
        for step in range(5):
            exchange = key_exchange(key_groups(layout, block, 3, step), layout)
            met |= {r for r in range(ranks) if r != rank and exchange.send[r] + exchange.receive[r]}
            left += sum(count for r, count in enumerate(exchange.send) if r // 4 != rank // 4)
        assert met <= exchange_peers(layout, block)
        assert peers <= len(exchange_peers(layout, block)) <= (11 if ranks == 12 else peers)
    assert (left > 0) == leaves

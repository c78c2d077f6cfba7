"""The order of an epoch: pure functions on numbers."""

import numpy as np
import pytest

from paco_ds.data.stream.order import EpochOrder
from paco_ds.distributed.ranks import MicroBatchLayout
from paco_ds.errors import RecipeError

COUNTS = [13, 40, 7, 55, 29]


def whole_epoch(order: EpochOrder, G: int) -> np.ndarray:
    return np.stack([order.batch(step, range(G)) for step in range(order.steps)])


@pytest.mark.parametrize(("counts", "G"), [(COUNTS, 12), ([144], 12), ([1] * 30, 7), ([5, 0, 9], 14)])
def test_each_planned_sample_comes_once_an_epoch(counts, G):
    """No id is repeated, and fewer than G are left out."""
    order = EpochOrder(counts, G, seed=3, epoch=1, window=4)
    ids = whole_epoch(order, G).ravel()
    assert len(np.unique(ids)) == len(ids) == order.steps * G
    assert sum(counts) - len(ids) < G
    assert ids.min() >= 0
    assert ids.max() < sum(counts)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_ranks_share_the_same_global_batches(world_size):
    """Any number of ranks that divides M gives the micro-batches that one rank gives."""
    order = EpochOrder(COUNTS, 24, seed=0, epoch=2, window=3)
    reference = whole_epoch(order, 24).reshape(order.steps, 12, 2)
    for rank in range(world_size):
        layout = MicroBatchLayout(2, 12, rank, world_size)
        for step in range(order.steps):
            for j in layout.own:
                np.testing.assert_array_equal(order.batch(step, layout.slots(j)), reference[step, j])


def test_the_order_is_a_function_of_seed_and_epoch():
    """Made twice it is the same; another seed or epoch gives another."""
    first, again, epoch, seed = (
        whole_epoch(EpochOrder(COUNTS, 12, seed=s, epoch=e), 12) for s, e in [(1, 0), (1, 0), (1, 1), (2, 0)]
    )
    np.testing.assert_array_equal(first, again)
    assert (first != epoch).mean() > 0.9
    assert (first != seed).mean() > 0.9


def test_one_shard_sorted_by_class_shows_every_id_within_ten_epochs():
    """The rotation leaves out other ids each epoch (without it two rare classes were never seen)."""
    profile = [1000, 599, 359, 215, 129, 77, 46, 27, 16, 10]
    seen = np.zeros(sum(profile), int)
    for epoch in range(10):
        seen[whole_epoch(EpochOrder([sum(profile)], 64, seed=1, epoch=epoch), 64).ravel()] += 1
    assert seen.min() >= 1


def test_a_build_sorted_by_class_still_mixes_classes_in_a_batch():
    """Slots lie far apart, so a batch of 64 holds nearly as many classes as a true permutation gives."""
    labels = np.sort(np.random.default_rng(0).integers(0, 500, 10_000))
    batches = whole_epoch(EpochOrder([10_000], 64, seed=0, epoch=0), 64)
    permuted = np.random.default_rng(1).permutation(10_000)[: batches.size].reshape(batches.shape)
    classes = [np.mean([len(np.unique(labels[b])) for b in ids]) for ids in (batches, permuted)]
    assert classes[0] > 0.95 * classes[1]


def test_a_window_is_one_contiguous_stretch_of_ids():
    """Unless a shard ends in it, a window's ids are consecutive: one range read."""
    order = EpochOrder([1000], 8, seed=5, epoch=0, window=10)
    for slot in range(8):
        ids = np.sort(order.window_ids(2, [slot])[0])
        assert len(ids) == 10
        assert ids[-1] - ids[0] == 9 or 0 in ids  # 0: the line was rotated inside this window


def test_any_position_costs_the_same_at_fourteen_million_samples():
    """Ten thousand shards and G = 32,768: a far step of a few slots needs no walk through the epoch."""
    order = EpochOrder([1400] * 10_000, 32_768, seed=1, epoch=3)
    ids = order.batch(order.steps - 1, range(0, 32_768, 4096))
    assert len(np.unique(ids)) == 8


def test_more_lanes_than_samples_is_refused():
    """The message names the settings to lower."""
    with pytest.raises(RecipeError, match=r"global batch of 64.*10 samples.*step.micro_batch"):
        EpochOrder([4, 6], 64, seed=0, epoch=0)


@pytest.mark.parametrize(("M", "W", "legal", "more"), [(4, 3, "1, 2, 4", 6), (2, 4, "1, 2", 4)])
def test_ranks_that_do_not_divide_the_micro_batches_are_refused(M, W, legal, more):
    """The message lists the legal numbers and the override that makes this one legal."""
    with pytest.raises(RecipeError, match=rf"legal numbers of ranks: {legal}.*--set step.micro_batches={more}"):
        MicroBatchLayout(8, M, 0, W)

"""Long-tailed parts and validation splits: the counts asked for, drawn by seed."""

import numpy as np
import pytest

from paco_ds.data.pack.card import Imbalance
from paco_ds.data.pack.samples import Samples, SamplesBuilder
from paco_ds.data.pack.selection import long_tailed_counts, make_long_tailed, split_off
from paco_ds.errors import DataError


def samples(counts: list[int], groups: list[int] | None = None) -> Samples:
    """So many images of each class, one after another."""
    rows = SamplesBuilder()
    for label, count in enumerate(counts):
        for number in range(count):
            rows.add(f"{label}/{number}", label, group=groups[len(rows)] if groups else None, size=1)
    return rows.build()


def test_exponential_profile_is_that_of_the_shipped_set() -> None:
    """Cui et al.: n F^(-r/(C-1)), rounded down."""
    counts = long_tailed_counts(np.full(10, 1000), Imbalance(factor=100))
    assert counts.tolist() == [1000, 599, 359, 215, 129, 77, 46, 27, 16, 10]


def test_cifar_100_lt_has_its_published_size() -> None:
    """10,847 images at factor 100."""
    counts = long_tailed_counts(np.full(100, 500), Imbalance(factor=100))
    assert counts.sum() == 10_847
    assert (counts[0], counts[-1]) == (500, 5)


def test_pareto_profile_ends_at_the_factor_with_a_steeper_head() -> None:
    """From 1280 to 5 images, as ImageNet-LT; the middle class has fewer than with exp."""
    factor = 1280 / 5
    counts = long_tailed_counts(np.full(1000, 1280), Imbalance(factor=factor, profile="pareto"))
    exp = long_tailed_counts(np.full(1000, 1280), Imbalance(factor=factor))
    assert counts[0] / counts[-1] == pytest.approx(factor, rel=0.1)
    assert (np.diff(counts) <= 0).all()
    assert counts[500] < exp[500]
    assert counts.sum() == pytest.approx(115_846, rel=0.02)


def test_profile_takes_what_there_is_and_keeps_every_class() -> None:
    """The largest class leads whatever its label; a class with fewer images keeps them; none is lost."""
    counts = long_tailed_counts(np.array([3, 100, 50]), Imbalance(factor=10_000))
    assert counts.tolist() == [1, 100, 1]
    assert long_tailed_counts(np.array([100, 2, 100]), Imbalance(factor=4)).tolist() == [100, 2, 50]
    assert long_tailed_counts(np.array([7]), Imbalance(factor=4)).tolist() == [7]


def test_long_tailed_part_is_drawn_by_seed() -> None:
    """The same seed the same images, another seed others, always the counts; the order of the source stays."""
    whole = samples([40, 40, 40])
    first, again = (make_long_tailed(whole, 3, Imbalance(factor=10), 0) for _ in range(2))
    other = make_long_tailed(whole, 3, Imbalance(factor=10), 1)
    assert list(first.names) == list(again.names) != list(other.names)
    assert first.counts(3).tolist() == other.counts(3).tolist() == [40, 12, 4]
    assert first.labels.tolist() == sorted(first.labels.tolist())


def test_validation_share_is_taken_of_each_class() -> None:
    """Rounded, never the last image of a class, nothing on both sides."""
    train, val = split_off("val", samples([100, 15, 2, 1]), 4, 0.1, 0)
    assert val.counts(4).tolist() == [10, 2, 0, 0]
    assert train.counts(4).tolist() == [90, 13, 2, 1]
    assert not set(train.names) & set(val.names)
    _, all_but_one = split_off("val", samples([3, 1]), 2, 0.99, 0)
    assert all_but_one.counts(2).tolist() == [2, 0]


def test_test_and_validation_are_two_draws() -> None:
    """Of one seed, from what the one before left."""
    rest, test = split_off("test", samples([100, 20]), 2, 0.2, 0)
    train, val = split_off("val", rest, 2, 0.2, 0)
    assert (test.counts(2).tolist(), val.counts(2).tolist()) == ([20, 4], [16, 3])
    assert len(set(train.names) | set(val.names) | set(test.names)) == 120
    assert set(split_off("val", samples([100, 20]), 2, 0.2, 0)[1].names) != set(test.names)


def test_groups_stay_on_one_side() -> None:
    """No product is in both; the share is met as far as whole groups allow, and not passed."""
    groups = [number // 4 for number in range(120)]
    train, val = split_off("val", samples([100, 20], groups), 2, 0.2, 0)
    assert not set(train.groups.tolist()) & set(val.groups.tolist())
    assert val.counts(2).tolist() == [20, 4]


def test_group_larger_than_the_share_stays_in_train() -> None:
    """One product that is half of its class."""
    train, val = split_off("val", samples([10], [0] * 5 + [1, 2, 3, 4, 5]), 1, 0.2, 0)
    assert len(val) == 2
    assert 0 in train.groups.tolist()
    assert 0 not in val.groups.tolist()


@pytest.mark.parametrize("factor", [10, 50, 100, 200])
@pytest.mark.parametrize(("classes", "images"), [(100, 5), (10, 50), (7, 500)])
def test_the_published_selection_takes_the_images_of_the_published_code(factor, classes, images) -> None:
    """LDAM-DRW's imbalance_cifar.py, written out, on labels in CIFAR's mixed order; the seed changes nothing."""
    labels = np.random.default_rng(3).permutation(np.repeat(np.arange(classes), images))
    rows = SamplesBuilder()
    for number, label in enumerate(labels.tolist()):
        rows.add(str(number), label, size=1)
    whole = rows.build()
    state = np.random.RandomState(0)
    theirs = []
    for label in np.unique(labels):
        count = int(images * ((1 / factor) ** (label / (classes - 1.0))))
        found = np.where(labels == label)[0]
        state.shuffle(found)
        theirs += found[: max(count, 1)].tolist()
    for seed in (0, 1):
        ours = make_long_tailed(whole, classes, Imbalance(factor=factor, selection="published"), seed)
        assert sorted(map(int, ours.names)) == sorted(theirs)


@pytest.mark.parametrize(("counts", "profile"), [([5, 4], "exp"), ([5, 5], "pareto")])
def test_the_published_selection_is_refused_where_it_was_not_published(counts, profile) -> None:
    """Classes of several sizes, and another profile."""
    with pytest.raises(DataError, match=r"selection published is of CIFAR-LT: .*; set it to seeded"):
        make_long_tailed(samples(counts), 2, Imbalance(factor=2, profile=profile, selection="published"), 0)

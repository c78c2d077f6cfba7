"""Samplers: how often each image occurs in an epoch, and how the copies lie."""

import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from paco_ds.data.stream.order import EpochOrder
from paco_ds.data.stream.sampler import ClassSampler, class_shares, places_of_classes

COUNTS = (1000, 300, 100, 30, 10, 4, 0)
KINDS = ("instance_balanced", "square_root", "class_balanced", "progressively_balanced")


class Labels(SimpleNamespace):
    def labels(self) -> np.ndarray:
        return self.values


def sampler_of(kind: Any, epochs: int = 10, shards: int = 12) -> ClassSampler:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(7, dtype=np.int32), COUNTS))
    sizes = tuple(len(part) for part in np.array_split(labels, shards))
    return ClassSampler(kind, sizes, Labels(values=labels), COUNTS, seed=3, epochs=epochs)


def test_shares_are_those_of_the_paper():
    """p_j = n_j^q / sum n_i^q over the classes that have images; progressive goes from q = 1 to q = 0."""
    n = np.array(COUNTS, float)
    there = n > 0
    np.testing.assert_allclose(class_shares("instance_balanced", COUNTS, 0, 10), n / n.sum())
    np.testing.assert_allclose(class_shares("class_balanced", COUNTS, 0, 10), there / there.sum())
    np.testing.assert_allclose(class_shares("square_root", COUNTS, 0, 10), np.sqrt(n) / np.sqrt(n).sum())
    for epoch in range(10):
        expected = (1 - epoch / 9) * n / n.sum() + epoch / 9 * there / there.sum()
        np.testing.assert_allclose(class_shares("progressively_balanced", COUNTS, epoch, 10), expected)
    np.testing.assert_allclose(class_shares("progressively_balanced", COUNTS, 0, 1), n / n.sum())


def test_places_add_up_and_are_the_shares_on_average():
    """Rounding takes or gives less than one place, and favours no class."""
    shares = np.array([0.5, 0.333, 0.1664, 0.0006])
    drawn = [places_of_classes(shares, 1000, draw) for draw in np.linspace(0, 1, 1000, endpoint=False)]
    assert all(places.sum() == 1000 and (places >= 0).all() for places in drawn)
    assert np.abs(np.array(drawn) - 1000 * shares / shares.sum()).max() < 1
    np.testing.assert_allclose(np.mean(drawn, axis=0), 1000 * shares / shares.sum(), atol=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_has_as_many_places_as_images_shared_evenly_within_classes(kind):
    """No image of a class a second time before all of it once; classes get their share to one place."""
    sampler = sampler_of(kind)
    labels = sampler._labels.labels()
    for epoch in (0, 4, 9):
        times = sampler.occurrences(epoch)
        assert times.sum() == len(labels)
        expected = len(labels) * class_shares(kind, COUNTS, epoch, 10)
        for label, places in enumerate(expected):
            of_class = times[labels == label]
            assert abs(of_class.sum() - places) < 1
            assert not len(of_class) or of_class.max() - of_class.min() <= 1


def test_images_left_out_of_an_epoch_come_in_others():
    """Of a class with a quarter of its images in an epoch each one is seen within a few."""
    sampler = sampler_of("class_balanced")
    seen = sum((sampler.occurrences(epoch) > 0).astype(int) for epoch in range(10))
    assert seen.min() >= 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_sequence_has_each_id_as_often_as_it_occurs(kind):
    """First copies first, shard by shard; it is the same in another process, and another each epoch."""
    sampler = sampler_of(kind)
    sequence, times = sampler.sequence(3), sampler.occurrences(3)
    np.testing.assert_array_equal(np.bincount(sequence, minlength=len(times)), times)
    distinct = int((times > 0).sum())
    assert len(np.unique(sequence[:distinct])) == distinct
    shard = np.searchsorted(np.cumsum(sampler.counts), sequence[:distinct], side="right")
    assert (np.diff(shard) != 0).sum() == len(sampler.counts) - 1
    copy = pickle.loads(pickle.dumps(sampler))
    np.testing.assert_array_equal(copy.sequence(3), sequence)
    assert not np.array_equal(sampler.sequence(4), sequence)


def test_copies_of_an_image_are_spread_over_the_epoch():
    """Not in successive steps: the 50 copies of each of the rarest class's images come in most tenths of the epoch."""
    sampler = sampler_of("class_balanced")
    labels = sampler._labels.labels()
    G = 16
    order = EpochOrder(sampler.counts, G, seed=3, epoch=0, window=8, sequence=sampler.sequence(0))
    batches = np.stack([order.batch(step, range(G)) for step in range(order.steps)])
    for image in np.flatnonzero(labels == 5):
        steps = np.flatnonzero((batches == image).any(axis=1))
        assert len(np.unique(steps * 10 // order.steps)) >= 9


def test_class_balanced_batches_hold_all_classes_alike():
    """Every class with images has its sixth of the places seen."""
    sampler = sampler_of("class_balanced")
    labels = sampler._labels.labels()
    order = EpochOrder(sampler.counts, 24, seed=3, epoch=0, window=8, sequence=sampler.sequence(0))
    batches = np.stack([labels[order.batch(step, range(24))] for step in range(order.steps)])
    share = np.stack([(batches == label).mean(axis=1) for label in range(6)])
    np.testing.assert_allclose(share.mean(axis=1), 1 / 6, atol=0.02)
    assert share.std(axis=1).max() < 1.5 * np.sqrt(1 / 6 * 5 / 6 / 24)  # no more uneven than drawing at random


def test_labels_travel_as_their_source():
    """A sampler in use does not carry its arrays to loader processes."""
    sampler = sampler_of("class_balanced")
    before = len(pickle.dumps(sampler))
    sampler.sequence(0)
    assert len(pickle.dumps(sampler)) == before

"""Samplers: how often each image occurs in an epoch (Kang et al. 2020, "Decoupling Representation and Classifier").

An epoch has as many places as there are images, whatever the sampler. Class j gets the share
p_j = n_j^q / sum of n_i^q of them: q = 1 instance-balanced, 1/2 square-root, 0 class-balanced; progressively balanced
goes from the first to the last in equal parts from the first epoch to the last (their Eq. 3). A class's places are
shared out evenly over its images: all of them before any a second time.

`data.sampler` changes only this. The class prior of the loss stays that of the data, as in Balanced Softmax (Ren et
al. 2020), who say that class-balanced batches together with it over-balance: use one of the two.

Layout, so that reads stay large: the first copies of all images that occur are laid out as an ordinary epoch, shard
by shard, and a window of them is one range with holes. Second and later copies follow in rounds, those of an image
spread evenly over the rounds; in each round the shards come in another order. Copies of an image thus lie far
apart, in other lanes and steps, and a round goes through the shards once. Its windows are several short ranges,
read ahead in parallel, and a rare class's few images are all that they touch.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from paco_ds.randomness import Stream, generator
from paco_ds.recipe import Sampler

_GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, cover 0..1 evenly however many are taken


class Labels(Protocol):
    """Where labels come from; asked for when the first epoch is laid out."""

    def labels(self) -> npt.NDArray[np.int32]: ...


def class_shares(sampler: Sampler, class_counts: npt.ArrayLike, epoch: int, epochs: int) -> npt.NDArray[np.float64]:
    """Each class's share of the places of an epoch, float64 [classes]; a class without images has none."""
    counts = np.asarray(class_counts, dtype=np.float64)

    def shares(q: float) -> npt.NDArray[np.float64]:
        weights = np.power(counts, q, where=counts > 0, out=np.zeros_like(counts))
        return weights / weights.sum()

    if sampler == "progressively_balanced":
        progress = epoch / (epochs - 1) if epochs > 1 else 0.0
        return (1 - progress) * shares(1.0) + progress * shares(0.0)
    return shares({"instance_balanced": 1.0, "square_root": 0.5, "class_balanced": 0.0}[sampler])


def places_of_classes(shares: npt.NDArray[np.float64], places: int, draw: float) -> npt.NDArray[np.int64]:
    """Whole numbers that add up to `places`, each less than 1 from its share; `draw` in [0, 1) decides the rounding.

    Over draws the expected number is the exact share (systematic sampling).
    """
    ends = np.floor(places * np.cumsum(shares) / shares.sum() + draw).astype(np.int64)
    ends[-1] = places
    return np.diff(ends, prepend=0)


class ClassSampler:
    """Lays out the epochs of one sampler. Every process makes its own from the labels, 12 bytes an image.

    Args:
        counts: samples of each shard.
        labels: asked once, when needed; it may travel to other processes with the sampler.
    """

    def __init__(
        self,
        sampler: Sampler,
        counts: tuple[int, ...],
        labels: Labels,
        class_counts: tuple[int, ...],
        *,
        seed: int,
        epochs: int,
    ) -> None:
        self.sampler, self.counts, self.class_counts = sampler, counts, class_counts
        self.seed, self.epochs = seed, epochs
        self._labels = labels
        self._place_in_class: npt.NDArray[np.int64] | None = None

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_place_in_class": None}

    def occurrences(self, epoch: int) -> npt.NDArray[np.int64]:
        """How often each id occurs in an epoch: int64 [samples], adding up to the number of samples."""
        labels = self._labels.labels()
        rng = generator(Stream.SAMPLER, self.seed)
        rounding, first = rng.random(2)
        shares = class_shares(self.sampler, self.class_counts, epoch, self.epochs)
        places = places_of_classes(shares, len(labels), (rounding + epoch * _GOLDEN) % 1)
        images = np.maximum(np.asarray(self.class_counts, dtype=np.int64), 1)
        every, more = np.divmod(places, images)
        # Who gets one more is a run of the class's images that begins elsewhere each epoch, at the same relative
        # place for all classes: the images left out lie together, where they need not be read.
        begin = np.floor((first + epoch * _GOLDEN) % 1 * images).astype(np.int64)
        turn = (self._places_in_class(labels) - begin[labels]) % images[labels]
        return every[labels] + (turn < more[labels])

    def line(self, epoch: int) -> npt.NDArray[np.int32]:
        """All ids of an epoch as often as they occur, in the order they are laid out: int32 [samples]."""
        times = self.occurrences(epoch)
        shard = np.repeat(np.arange(len(self.counts)), self.counts)
        seen = np.flatnonzero(times)
        first = seen[np.argsort(_shuffled(shard[seen], 0, self.seed, epoch), kind="stable")]
        again = np.repeat(np.arange(len(times)), np.maximum(times - 1, 0))
        if not len(again):
            return first.astype(np.int32)
        copies = times[again] - 1
        number = np.arange(len(again)) - np.searchsorted(again, again)
        phase = generator(Stream.SAMPLER, self.seed, epoch).random(len(times))[again]
        rounds = int(copies.max())
        in_round = np.floor((number + phase) * rounds / copies).astype(np.int64)
        key = in_round.astype(np.uint64) << np.uint64(32) | _shuffled(shard[again], 1 + in_round, self.seed, epoch)
        return np.concatenate([first, again[np.argsort(key, kind="stable")]]).astype(np.int32)

    def _places_in_class(self, labels: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """0 for the first image of its class by id, 1 for the second, and so on."""
        if self._place_in_class is None:
            order = np.argsort(labels, kind="stable")
            by_class = np.bincount(labels, minlength=len(self.class_counts))
            starts = np.cumsum(by_class) - by_class
            places = np.empty(len(labels), dtype=np.int64)
            places[order] = np.arange(len(labels)) - np.repeat(starts, by_class)
            self._place_in_class = places
        return self._place_in_class


def _shuffled(shard: np.ndarray, number: int | np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """32 random bits (uint64) of each (shard, round): sorted by them, shards come in another order each round."""
    salt = np.random.PCG64([Stream.SAMPLER, seed, epoch, 1]).random_raw()
    bits = np.asarray(shard, np.uint64) + np.asarray(number, np.uint64) * np.uint64(2**32) + np.uint64(salt)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # the finalizer of SplitMix64
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return (bits ^ (bits >> np.uint64(31))) >> np.uint64(32)

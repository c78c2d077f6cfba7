"""Samplers: how often each image occurs in an epoch (Kang et al. 2020, "Decoupling Representation and Classifier").

An epoch has as many places as there are images, for every sampler. Class j gets the share
p_j = n_j^q / sum of n_i^q of them: q = 1 instance-balanced, 1/2 square-root, 0 class-balanced; progressively balanced
moves linearly from the first to the last over the epochs (their Eq. 3). The places of a class are divided evenly over
its images: each occurs once before any occurs twice.

The class prior of the loss stays that of the data, as in Balanced Softmax (Ren et al. 2020). They find that
class-balanced batches together with it over-balance: use one of the two.

Layout, so that reads stay large: the first copies of all images are laid out as an ordinary epoch, shard by shard, and
a window of them is one range with gaps. Further copies follow in rounds, the copies of an image spread evenly over the
rounds; each round visits the shards once, in another order. So copies of an image lie far apart, in other batch slots
and steps. The windows of a round are several short ranges, prefetched in parallel.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from paco_ds.config.data import Sampler
from paco_ds.randomness import DrawPurpose, generator, permutation

_GOLDEN = 0.6180339887498949  # its multiples modulo 1 cover 0..1 evenly, for any number of them


class Labels(Protocol):
    """Anything that gives labels by id."""

    def labels(self) -> npt.NDArray[np.int32]: ...


class SharedLabels:
    """Labels by id, int32, in memory that a rank shares with its loader processes."""

    def __init__(self, labels: npt.NDArray[np.int32]) -> None:
        self._tensor = torch.tensor(labels, dtype=torch.int32).share_memory_()

    def labels(self) -> npt.NDArray[np.int32]:
        """Labels by id, int32 [samples]."""
        return self._tensor.numpy()


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
    """Integers that sum to `places`, each within 1 of its share; `draw` in [0, 1) decides the rounding.

    The expectation over draws is the exact share (systematic sampling).
    """
    ends = np.floor(places * np.cumsum(shares) / shares.sum() + draw).astype(np.int64)
    ends[-1] = places
    return np.diff(ends, prepend=0)


class ClassSampler:
    """The sequences of one sampler, by epoch. Every process computes them from the labels: 8 bytes per image.

    Args:
        counts: samples of each shard.
        labels: pickled with the sampler; what is derived from them is not.
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
        self._place_in_class: npt.NDArray[np.int32] | None = None

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_place_in_class": None}

    def occurrences(self, epoch: int) -> npt.NDArray[np.int32]:
        """How often each id occurs in an epoch: int32 [samples], summing to the number of samples."""
        labels = self._labels.labels()
        rng = generator(DrawPurpose.SAMPLER, self.seed)
        rounding, first = rng.random(2)
        shares = class_shares(self.sampler, self.class_counts, epoch, self.epochs)
        places = places_of_classes(shares, len(labels), (rounding + epoch * _GOLDEN) % 1)
        images = np.maximum(np.asarray(self.class_counts, dtype=np.int64), 1)
        every, more = np.divmod(places, images)
        # The images that get one more are consecutive within their class, from a start that moves each epoch and has
        # the same relative position in all classes: the images left out are adjacent, so they need not be read.
        begin = np.floor((first + epoch * _GOLDEN) % 1 * images).astype(np.int32)
        turn = self._places_in_class(labels) - begin[labels]
        turn += np.where(turn < 0, images.astype(np.int32)[labels], 0)
        return every.astype(np.int32)[labels] + (turn < more.astype(np.int32)[labels])

    def sequence(self, epoch: int) -> npt.NDArray[np.int32]:
        """All ids of an epoch, each as often as it occurs: int32 [samples]."""
        times = self.occurrences(epoch)
        ends = np.cumsum(self.counts)
        first = [
            end - count + np.flatnonzero(times[end - count : end])
            for end, count in ((ends[number], self.counts[number]) for number in self._shuffled_shards(epoch))
        ]
        repeated = np.flatnonzero(times > 1).astype(np.int32)
        copies = times[repeated] - 1
        if not len(repeated):
            return np.concatenate(first).astype(np.int32)
        shard = np.repeat(np.arange(len(self.counts), dtype=np.int32), self.counts)[repeated]
        phase = generator(DrawPurpose.SAMPLER, self.seed, epoch).random(len(repeated), dtype=np.float32)
        rounds = int(copies.max())
        # for each further copy: its row in `repeated`, and the number of the copy
        row = np.repeat(np.arange(len(repeated), dtype=np.int32), copies)
        number = np.arange(len(row)) - np.repeat(np.cumsum(copies) - copies, copies)
        in_round = ((number + phase[row]) * rounds / copies[row]).astype(np.int64)
        by_shard = np.argsort(_shuffled(shard[row], in_round, self.seed, epoch), kind="stable")
        by_round = np.argsort(_smallest(in_round, rounds)[by_shard], kind="stable")
        return np.concatenate([*first, repeated[row[by_shard[by_round]]]]).astype(np.int32)

    def _shuffled_shards(self, epoch: int) -> npt.NDArray[np.int64]:
        return permutation(len(self.counts), DrawPurpose.SHARDS, self.seed, epoch)

    def _places_in_class(self, labels: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """0 for the first image of its class by id, 1 for the second, and so on."""
        if self._place_in_class is None:
            order = np.argsort(_smallest(labels, len(self.class_counts)), kind="stable")
            by_class = np.bincount(labels, minlength=len(self.class_counts))
            starts = np.cumsum(by_class) - by_class
            places = np.empty(len(labels), dtype=np.int32)
            places[order] = np.arange(len(labels)) - np.repeat(starts, by_class)
            self._place_in_class = places
        return self._place_in_class


def _smallest(numbers: np.ndarray, below: int) -> np.ndarray:
    """The numbers as uint16 where they fit, which numpy sorts in linear time."""
    return numbers.astype(np.uint16) if below <= 2**16 else numbers


def _shuffled(shard: np.ndarray, number: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """16 random bits of each (shard, round); sorting by them gives each round another order of the shards.

    Shards with equal bits keep their order, since ids are sorted before.
    """
    salt = np.random.PCG64([DrawPurpose.SAMPLER, seed, epoch, 1]).random_raw()
    bits = (number.astype(np.uint64) << np.uint64(32)) + shard.astype(np.uint64) + np.uint64(salt)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # the finalizer of SplitMix64
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return ((bits ^ (bits >> np.uint64(31))) >> np.uint64(48)).astype(np.uint16)

"""Selection from a source: a long-tailed subset of train, and validation and test splits taken from train."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from paco_ds.data.pack.card import Imbalance
from paco_ds.data.pack.samples import Samples
from paco_ds.errors import DataError

_PARETO_POWER = 3  # 1,000 classes of 1280 to 5 images then have 116,600 in total; ImageNet-LT has 115,846
_IMBALANCE_STREAM = 1  # makes this draw and those of split_off independent
STREAMS = {"val": 2, "test": 3}


def long_tailed_counts(available: npt.NDArray[np.int64], imbalance: Imbalance) -> npt.NDArray[np.int64]:
    """Images to keep of each class, int64 [classes].

    Classes are ranked by their images, the larger and then the lower label first; rank r of C gets, with n the
    images of the first class and F the factor:

    - exp: n F^(-r/(C-1)) (Cui et al. 2019);
    - pareto: n (1 + (F^(1/3) - 1) r/(C-1))^-3, a power law, whose head falls faster (as that of ImageNet-LT).

    Never more than available, and at least one of every class that has images.
    """
    rank = np.argsort(-available, kind="stable")
    place = np.arange(len(available)) / max(len(available) - 1, 1)
    if imbalance.profile == "exp":
        share = imbalance.factor**-place
    else:
        share = (1 + (imbalance.factor ** (1 / _PARETO_POWER) - 1) * place) ** -_PARETO_POWER
    # 1e-9: 100 ** -1 * 1000 must give 10, whatever the last bit
    wanted = np.maximum(np.floor(available.max() * share + 1e-9), 1).astype(np.int64)
    counts = np.empty_like(available)
    counts[rank] = np.minimum(wanted, available[rank])
    return counts


def make_long_tailed(samples: Samples, classes: int, imbalance: Imbalance, seed: int) -> Samples:
    """A random subset of a split with these counts, in the order of the split.

    Raises:
        DataError: the published selection of a split whose classes differ in size.
    """
    available = samples.counts(classes)
    counts = long_tailed_counts(available, imbalance)
    if imbalance.selection == "published":
        if imbalance.profile != "exp" or len(set(available.tolist())) > 1:
            raise DataError(
                "imbalance.selection published is of CIFAR-LT: classes of one size and profile exp; set it to seeded"
            )
        order = _published_order(samples, classes)
    else:
        order = _drawn_by_class(samples, seed, _IMBALANCE_STREAM)
    return samples.take(np.sort(order[_place_in_class(samples.labels[order]) < counts[samples.labels[order]]]))


def split_off(name: str, samples: Samples, classes: int, share: float, seed: int) -> tuple[Samples, Samples]:
    """(train, val or test, as named) of a split: `share` of each class, rounded; at least one image of a class stays in
    train.

    With groups, whole groups move in random order, as long as no class exceeds its share.
    """
    stream = STREAMS[name]
    available = samples.counts(classes)
    wanted = np.minimum(np.floor(available * share + 0.5).astype(np.int64), np.maximum(available - 1, 0))
    if len(samples.groups):
        taken = _whole_groups(samples, wanted, seed, stream)
    else:
        order = _drawn_by_class(samples, seed, stream)
        taken = np.zeros(len(samples), bool)
        taken[order[_place_in_class(samples.labels[order]) < wanted[samples.labels[order]]]] = True
    return samples.take(np.flatnonzero(~taken)), samples.take(np.flatnonzero(taken))


def _whole_groups(samples: Samples, wanted: npt.NDArray[np.int64], seed: int, stream: int) -> npt.NDArray[np.bool_]:
    by_group = np.argsort(samples.groups, kind="stable")
    cuts = np.flatnonzero(np.diff(samples.groups[by_group])) + 1
    members = np.split(by_group, cuts)
    left = wanted.copy()
    taken = np.zeros(len(samples), bool)
    for number in np.argsort(_bits(len(members), seed, stream), kind="stable").tolist():
        labels = samples.labels[members[number]]
        found, images = np.unique(labels, return_counts=True)
        if (images <= left[found]).all():
            left[found] -= images
            taken[members[number]] = True
    return taken


def _drawn_by_class(samples: Samples, seed: int, stream: int) -> npt.NDArray[np.int64]:
    """Rows sorted by label, in random order within a label."""
    return np.lexsort((_bits(len(samples), seed, stream), samples.labels))


def _published_order(samples: Samples, classes: int) -> npt.NDArray[np.int64]:
    """Rows sorted by label, in the order within a label that the published code draws.

    LDAM-DRW's imbalance_cifar.py, and PaCo's after it: `np.random.seed(0)`, then a shuffle of each class in turn. The
    sequence of numpy's RandomState is frozen (NEP 19).
    """
    rng = np.random.RandomState(0)
    rows = [np.flatnonzero(samples.labels == label) for label in range(classes)]
    for row in rows:
        rng.shuffle(row)
    return np.concatenate(rows)


def _bits(count: int, seed: int, stream: int) -> npt.NDArray[np.uint64]:
    """Random bits that are the same in later versions of numpy, see `write.plan_shards`."""
    bits: npt.NDArray[np.uint64] = np.random.PCG64([seed, stream]).random_raw(count)
    return bits


def _place_in_class(labels: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """For sorted labels: the number of equal labels before each."""
    return np.arange(len(labels)) - np.searchsorted(labels, labels)

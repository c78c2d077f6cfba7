"""Owns the paper's closed forms: what the losses reach at their optimum, and how strongly they pull.

Eq. (9)-(18) of the supplementary material of "Parametric Contrastive Learning". They hold for the summed
form; the published normalisation has the same optima. Arguments may be floats or numpy arrays.

As a command it says what they mean for a data set, alpha and queue length (see docs/theory.md):

    python -m paco_ds.paper.theory --card shards/fashion-mnist-lt.yaml --alpha .05 --queue 8192 --micro-batch 32
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from paco_ds.command import report_user_errors
from paco_ds.data.card import load_card
from paco_ds.data.manifest import MANIFEST_FILE, load_manifest
from paco_ds.data.pack.sources import class_counts
from paco_ds.errors import DataError, UserError

Floats = NDArray[np.float64]
Number = TypeVar("Number", float, Floats)


def expected_positives(class_prior: Number, queue_length: int, micro_batch: int) -> Number:
    """Eq. (9): K_y = q(y) (queue length + 2 m - 1), positives that an anchor of class y meets on average.

    It counts an anchor's own key as if it were drawn like any other. As that one is always a positive, Eq. (9) is
    far too low for the rarest classes; :func:`positives_distribution` is exact.

    Args:
        class_prior: q(y), the class's share of the training images.
        queue_length: filled slots of the queue.
        micro_batch: m, anchors that meet each other and their keys.
    """
    return class_prior * (queue_length + 2 * micro_batch - 1)


def positives_distribution(class_prior: float, queue_length: int, micro_batch: int) -> tuple[Floats, Floats]:
    """How many positives an anchor of a class meets, and how probably, where images are drawn independently.

    Its own key is one of them for certain. Each of the m - 1 other images of the micro-batch brings two, its query
    and its key, with probability q(y); each key of the queue is one with probability q(y). The mean is
    1 + q(y) (queue length + 2 m - 2).

    Args:
        class_prior: q(y) in (0, 1].
        queue_length: filled slots of the queue, at least 0.
        micro_batch: m, at least 1.

    Returns:
        (K, probability), each [P]: whole numbers from 1 in order, and probabilities that sum to 1. Numbers too far
        from the mean to have a probability above 1e-20 are left out.

    Raises:
        ValueError: an argument out of range.
    """
    if not 0 < class_prior <= 1 or queue_length < 0 or micro_batch < 1:
        raise ValueError(
            f"class_prior must be in (0, 1], queue_length at least 0, micro_batch at least 1: "
            f"{class_prior=}, {queue_length=}, {micro_batch=}"
        )
    in_queue, p_queue = _binomial(queue_length, class_prior)
    in_batch, p_batch = _binomial(micro_batch - 1, class_prior)
    p_pairs = np.zeros(2 * len(p_batch) - 1)  # images come with query and key: every other number
    p_pairs[::2] = p_batch
    probability = np.convolve(p_queue, p_pairs)
    first = 1 + in_queue[0] + 2 * in_batch[0]
    return first + np.arange(len(probability), dtype=np.float64), probability


def supcon_optimum(positives: Number) -> Number:
    """Remark 1: p+ = 1 / K_y, the probability of each positive where the SupCon loss is smallest."""
    return 1 / positives


def paco_optimum(positives: Number, alpha: float) -> tuple[Number, Number]:
    """Remark 2: (p+, p_c) = (alpha, 1) / (1 + alpha K_y), the probabilities of each positive and of the own
    center where the PaCo loss is smallest."""
    return alpha / (1 + alpha * positives), 1 / (1 + alpha * positives)


def supcon_minimum(positives: Number, p_sum: float = 1.0) -> Number:
    """Eq. (12): -K_y log(p_sum / K_y), the least SupCon loss of an anchor with p_sum on its positives."""
    return -positives * np.log(p_sum / positives)


def paco_minimum(positives: Number, alpha: float, p_sum: float = 1.0) -> Number:
    """Eq. (17): the least PaCo loss of an anchor with p_sum on its positives and center in all; alpha > 0."""
    p_positive, p_center = paco_optimum(positives, alpha)
    return -np.log(p_sum * p_center) - alpha * positives * np.log(p_sum * p_positive)


def center_gradient_scale(p_center: Number, alpha: float, positives: Number, own: bool) -> Number:
    """Eq. (18): the factor f in dL_i / dc_k = f x_i, f = (alpha K* + 1) p_ck - [y_i = k], in the summed form.

    Args:
        p_center: p_ck, the probability of center k.
        alpha: weight of a positive.
        positives: K*, the anchor's positives.
        own: whether k is the anchor's class.
    """
    return (alpha * positives + 1) * p_center - float(own)


@dataclass(frozen=True)
class LongTail:
    """A training split as the closed forms see it, classes from the largest to the smallest.

    Attributes:
        classes, shots: name and shot of each class.
        counts_C: its training images, int64, none of them 0.
        empty: classes left out for want of training images: there is no anchor of them.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    shots: tuple[str, ...]
    counts_C: NDArray[np.int64]
    empty: tuple[str, ...] = ()

    @property
    def prior_C(self) -> Floats:
        """q(y) of each class."""
        return self.counts_C / self.counts_C.sum()


@dataclass(frozen=True)
class Optima:
    """Where the losses are smallest, for each of C classes and A values of alpha; all float64.

    Attributes:
        positives_C: K_y.
        supcon_C: p+ of SupCon.
        positive_AC, center_AC: p+ and p_c of PaCo.
    """

    positives_C: Floats
    supcon_C: Floats
    positive_AC: Floats
    center_AC: Floats


def optima_by_equation_9(prior_C: Floats, alphas_A: Floats, queue_length: int, micro_batch: int) -> Optima:
    """Remarks 1 and 2 with K_y of Eq. (9). A SupCon "probability" above 1 shows where Eq. (9) does not hold."""
    positives_C = expected_positives(prior_C, queue_length, micro_batch)
    center_AC = 1 / (1 + np.outer(alphas_A, positives_C))
    return Optima(positives_C, supcon_optimum(positives_C), alphas_A[:, None] * center_AC, center_AC)


def mean_optima(prior_C: Floats, alphas_A: Floats, queue_length: int, micro_batch: int) -> Optima:
    """Means of K_y and of Remarks 1 and 2 over :func:`positives_distribution`.

    They are what training logs as optimum, where the queue is full and images are drawn independently: the optimum
    of each anchor for the positives it met, averaged over anchors.
    """
    priors, class_of = np.unique(prior_C, return_inverse=True)
    alphas_A1 = alphas_A[:, None]
    positives, supcon, center = [], [], []
    for prior in priors:
        K, probability = positives_distribution(float(prior), queue_length, micro_batch)
        positives.append(K @ probability)
        supcon.append(supcon_optimum(K) @ probability)
        center.append((1 / (1 + alphas_A1 * K)) @ probability)
    center_AC = np.stack(center, axis=1)[:, class_of]
    return Optima(np.array(positives)[class_of], np.array(supcon)[class_of], alphas_A1 * center_AC, center_AC)


def _binomial(draws: int, probability: float) -> tuple[Floats, Floats]:
    """Successes that are not far too improbable, in order, and their probabilities."""
    if draws == 0 or probability == 1:
        return np.array([float(draws)]), np.ones(1)
    mean = draws * probability
    spread = 12 * math.sqrt(mean * (1 - probability)) + 30
    k = np.arange(max(0, math.floor(mean - spread)), min(draws, math.ceil(mean + spread)) + 1, dtype=np.float64)
    # from each to the next the probability changes by (n - k) / (k + 1) odds: no factorial of a million
    odds = probability / (1 - probability)
    log_p = np.concatenate([[0.0], np.cumsum(np.log((draws - k[:-1]) / (k[:-1] + 1) * odds))])
    p = np.exp(log_p - log_p.max())
    return k, p / p.sum()


def read_long_tail(where: Path, split: str = "train", root: Path | None = None) -> LongTail:
    """Class counts of a split, from built shards or from a dataset card whose labels are at hand.

    Args:
        where: a directory of shards (or its manifest.json), or a card.
        root: folder of the card's files, if not the one it names.

    Raises:
        DataError: there is no such split, or nothing at hand tells how many images its classes have.
    """
    if where.is_dir() or where.name == MANIFEST_FILE:
        manifest = load_manifest(where if where.is_dir() else where.parent)
        name, classes, shots = manifest.name, manifest.classes, manifest.shots
        counts = manifest.split(split).class_counts
    else:
        card = load_card(where)
        if split not in card.splits:
            raise DataError(f"card {where} has no split {split!r}; its splits are: {', '.join(card.splits)}")
        try:
            classes, counts = class_counts(card, root or where.parent / card.root, split)
        except DataError as error:
            raise DataError(
                f"the class counts of {where} are not at hand: {error}. Give --root FOLDER with the files the card "
                f"names for {split}, or give as --card the directory of its built shards, whose {MANIFEST_FILE} has "
                f"the counts (tools/build_shards.py build {where} --output DIRECTORY)"
            ) from error
        name, shots = card.name, card.shots
    order = [c for c in sorted(range(len(counts)), key=lambda c: -counts[c]) if counts[c]]
    return LongTail(
        name,
        split,
        tuple(classes[c] for c in order),
        tuple(shots.of(counts[c]) for c in order),
        np.array([counts[c] for c in order]),
        tuple(name for name, count in zip(classes, counts, strict=True) if not count),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, draw the pictures if there is an --output; returns the exit status."""
    arguments = _parser().parse_args(argv)
    # not at the top: it needs this module, and matplotlib takes its time
    from paco_ds.paper.optima import OptimaPage

    with report_user_errors():
        output: Path | None = arguments.output
        if output is not None and output.suffix not in ("", ".png"):
            raise UserError(f"--output {output} is neither a folder nor a .png: name it so")
        page = OptimaPage(
            read_long_tail(arguments.card, arguments.split, arguments.root),
            arguments.alpha,
            arguments.queue,
            arguments.micro_batch,
        )
        # A pipe or a log has no width of its own, and 80 columns would cut figures off.
        page.show(Console() if sys.stdout.isatty() else Console(width=120))
        if output is not None:
            print("drawn:", *page.draw(output))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m paco_ds.paper.theory",
        description="Head to tail, the optimum of SupCon and of PaCo, and which alpha gives which p_c.",
    )
    parser.add_argument("--card", required=True, type=Path, help="dataset card, or directory of built shards")
    parser.add_argument("--split", default="train", help="whose class counts (default %(default)s)")
    parser.add_argument("--root", type=Path, help="folder of the card's files, if not the one it names")
    parser.add_argument("--alpha", type=_positive, default=0.05, help="weight of a positive (default %(default)s)")
    parser.add_argument("--queue", type=_at_least(0), default=8192, help="queue.length (default %(default)s)")
    parser.add_argument("--micro-batch", type=_at_least(1), default=32, help="step.micro_batch (default %(default)s)")
    parser.add_argument("--output", type=Path, help="a .png for one picture, a folder for one picture each")
    return parser


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def _at_least(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        return int(text)

    integer.__name__ = "whole number"  # what argparse calls a text that is none
    return integer


if __name__ == "__main__":
    sys.exit(main())

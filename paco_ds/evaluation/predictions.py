"""Metrics from single predictions: F1, calibration, confusions, accuracy under other test distributions.

Shapes: N images of a split, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paco_ds.distributed.ranks import Ranks
from paco_ds.evaluation.correctness import KEY, packed

BINS = 15  # of confidence, as Guo et al. 2017
IMBALANCES = (50, 25, 10, 5, 2)  # of the test distributions of SADE (Zhang et al. 2022)
MOST_CONFUSIONS = 20


class Recorder:
    """Collects the predictions of this rank, batch by batch, and gathers those of all ranks."""

    def __init__(self) -> None:
        self._batches: list[Tensor] = []

    def add(self, logits_BC: Tensor, labels_B: Tensor, ids_B: Tensor, valid_B: Tensor) -> None:
        """Add a batch: floating logits [B, C], int64 labels [B], int64 ids of the samples [B], bool valid [B] (False
        for padding)."""
        confidence_B, predicted_B = logits_BC.double().softmax(1).max(1)
        columns = [labels_B.double(), predicted_B.double(), confidence_B, ids_B.double(), valid_B.double()]
        self._batches.append(torch.stack(columns, 1))

    def gather(self, ranks: Ranks) -> Predictions:
        """All images of the split, once. A collective: every rank has equally many batches."""
        rows = ranks.gather(torch.cat(self._batches)).flatten(0, 1).cpu()
        rows = rows[rows[:, 4] > 0]
        return Predictions(rows[:, 0].long(), rows[:, 1].long(), rows[:, 2], rows[:, 3].long())


@dataclass(frozen=True)
class Predictions:
    """Labels int64 [N], predicted classes int64 [N], their probabilities float64 [N], and ids of the samples in their
    split int64 [N]."""

    labels_N: Tensor
    predicted_N: Tensor
    confidence_N: Tensor
    ids_N: Tensor


@dataclass(frozen=True)
class Detail:
    """Metrics of a split as fractions; None without images.

    Attributes:
        balanced: mean of the classes' accuracies, over classes with images.
        macro_f1: mean of the classes' F1, over classes that have images or were predicted (scikit-learn's).
        calibration_error: expected calibration error, 15 bins of equal width (Guo et al. 2017).
        reliability: of each of these bins that has images: mean confidence, accuracy, images.
        confusions: (class, taken for, images, share of the class's images), most images first.
        test_agnostic: top-1 under long-tailed test distributions of SADE, "forward-50" (as in training), ...,
            "uniform", ..., "backward-50" (reversed).
        correct: which images were classified right, by id, see `correctness`.
    """

    balanced: float | None
    macro_f1: float | None
    calibration_error: float | None
    reliability: Sequence[tuple[float, float, int]]
    confusions: Sequence[tuple[int, int, int, float]]
    test_agnostic: dict[str, float]
    correct: Mapping[str, Any]

    def to_json(self, class_names: Sequence[str]) -> dict[str, Any]:
        """Further keys of metrics.json."""
        return {
            "balanced": self.balanced,
            "macro_f1": self.macro_f1,
            "calibration_error": self.calibration_error,
            "reliability": [
                {"confidence": confidence, "accuracy": accuracy, "images": images}
                for confidence, accuracy, images in self.reliability
            ],
            "confusions": [
                {"class": class_names[own], "taken_for": class_names[other], "images": images, "share": share}
                for own, other, images, share in self.confusions
            ],
            "test_agnostic": self.test_agnostic,
            KEY: self.correct,
        }


def detail(predictions: Predictions, class_counts: Sequence[int]) -> Detail:
    """The metrics of a split's predictions.

    Args:
        class_counts: training images of each class; they order the classes from head to tail.
    """
    labels_N, predicted_N = predictions.labels_N, predictions.predicted_N
    classes = len(class_counts)
    total_C, guessed_C = (torch.bincount(t, minlength=classes).double() for t in (labels_N, predicted_N))
    correct_N = labels_N == predicted_N
    correct_C = torch.bincount(labels_N[correct_N], minlength=classes).double()
    present_C, judged_C = total_C > 0, total_C + guessed_C > 0
    accuracy_C = correct_C / total_C  # nan for a class without images
    return Detail(
        balanced=_mean(accuracy_C[present_C]),
        macro_f1=_mean((2 * correct_C / (total_C + guessed_C))[judged_C]),
        calibration_error=calibration_error(predictions),
        reliability=reliability(predictions),
        confusions=confusions(predictions, classes),
        test_agnostic=accuracy_by_distribution(accuracy_C, class_counts),
        correct=packed(correct_N[predictions.ids_N.argsort()].numpy()),
    )


def reliability(predictions: Predictions, bins: int = BINS) -> list[tuple[float, float, int]]:
    """(mean confidence, accuracy, images) of each bin of confidence ((b - 1) / bins, b / bins] that has images."""
    # added up in the order of confidence: the order of the images is another on other numbers of ranks
    confidence_N, order_N = predictions.confidence_N.sort()
    bin_N = (confidence_N * bins).ceil().long().clamp(1, bins) - 1
    correct_N = (predictions.labels_N == predictions.predicted_N)[order_N].double()
    images_b = torch.bincount(bin_N, minlength=bins)
    sums_bk = torch.zeros(bins, 2, dtype=torch.float64)
    sums_bk.index_add_(0, bin_N, torch.stack([confidence_N, correct_N], 1))
    return [
        (confidence / images, correct / images, images)
        for (confidence, correct), images in zip(sums_bk.tolist(), images_b.tolist(), strict=True)
        if images
    ]


def calibration_error(predictions: Predictions, bins: int = BINS) -> float | None:
    """sum_b n_b / N |accuracy_b - confidence_b| over `reliability`'s bins."""
    images = len(predictions.labels_N)
    if not images:
        return None
    return sum(n * abs(right - sure) for sure, right, n in reliability(predictions, bins)) / images


def confusions(
    predictions: Predictions, classes: int, most: int = MOST_CONFUSIONS
) -> list[tuple[int, int, int, float]]:
    """(class, taken for, images, share of the class's images) of the most frequent wrong pairs."""
    wrong_N = predictions.labels_N != predictions.predicted_N
    pairs_N = predictions.labels_N[wrong_N] * classes + predictions.predicted_N[wrong_N]
    pair_P, images_P = pairs_N.unique(return_counts=True)
    total_C = torch.bincount(predictions.labels_N, minlength=classes)
    order = torch.sort(images_P, descending=True, stable=True).indices[:most]
    return [
        (own := pair // classes, pair % classes, images, images / int(total_C[own]))
        for pair, images in zip(pair_P[order].tolist(), images_P[order].tolist(), strict=True)
    ]


def accuracy_by_distribution(accuracy_C: Tensor, class_counts: Sequence[int]) -> dict[str, float]:
    """Expected top-1 on test sets with the shares of `share_by_distribution`, which SADE samples. Classes without test
    images (nan) are left out."""
    present_C = ~accuracy_C.isnan()
    if not present_C.any():
        return {}
    shares = {name: share_C[present_C] for name, share_C in share_by_distribution(class_counts).items()}
    return {name: float((share * accuracy_C[present_C]).sum() / share.sum()) for name, share in shares.items()}


def share_by_distribution(class_counts: Sequence[int]) -> dict[str, Tensor]:
    """{test distribution of SADE: what the classes' shares are proportional to [C], float64}: rho^(-r_c / (C - 1)) for
    class c of rank r_c by training images, or with the ranks reversed; "uniform" between the two."""
    rank_C = torch.tensor(class_counts).argsort(descending=True, stable=True).argsort().double()
    place_C = rank_C / max(len(class_counts) - 1, 1)
    forward = {f"forward-{rho}": rho**-place_C for rho in IMBALANCES}
    backward = {f"backward-{rho}": rho ** (place_C - 1) for rho in reversed(IMBALANCES)}
    return {**forward, "uniform": torch.ones_like(place_C), **backward}


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if len(values) else None

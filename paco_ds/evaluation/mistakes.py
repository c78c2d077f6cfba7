"""Which misclassified images are worth a look: examples of the confusions, and those of the tail.

Shapes: N images of a split, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from paco_ds.data.manifest import SHOTS
from paco_ds.evaluation.predictions import Predictions

MOST_PAIRS = 12
OF_A_PAIR = 3
MOST_OF_THE_TAIL = 24
OF_A_CLASS = 2


@dataclass(frozen=True)
class Mistake:
    """An image that was misclassified.

    Attributes:
        image: id of the sample in its split.
        label, predicted: classes.
        confidence: probability of the predicted class.
    """

    image: int
    label: int
    predicted: int
    confidence: float


@dataclass(frozen=True)
class Mistakes:
    """Misclassified images, the surest of a class or pair first.

    Attributes:
        confused: up to `OF_A_PAIR` images of each of the most frequent confusions, in their order.
        tail: up to `OF_A_CLASS` images of each Few and Medium class, smallest class first.
    """

    confused: Sequence[Sequence[Mistake]]
    tail: Sequence[Mistake]

    def to_json(self, class_names: Sequence[str]) -> dict[str, Any]:
        """The key `mistakes` of metrics.json."""

        def listed(mistakes: Sequence[Mistake]) -> list[dict[str, Any]]:
            return [
                {
                    "image": each.image,
                    "class": class_names[each.label],
                    "taken_for": class_names[each.predicted],
                    "confidence": each.confidence,
                }
                for each in mistakes
            ]

        return {"confused": [listed(pair) for pair in self.confused], "tail": listed(self.tail)}


def mistakes(
    predictions: Predictions,
    confusions: Sequence[tuple[int, int, int, float]],
    class_counts: Sequence[int],
    shots_of_classes: Sequence[str],
) -> Mistakes:
    """Those of a split; the same at every number of ranks.

    Args:
        confusions: (class, taken for, ...) in their order.
        class_counts: training images of each class.
    """
    wrong_N = predictions.labels_N != predictions.predicted_N
    columns = (predictions.ids_N, predictions.labels_N, predictions.predicted_N, predictions.confidence_N)
    surest_first = sorted(
        (Mistake(*row) for row in zip(*(column[wrong_N].tolist() for column in columns), strict=True)),
        key=lambda each: (-each.confidence, each.image),
    )
    of_pair: dict[tuple[int, int], list[Mistake]] = {}
    of_class: dict[int, list[Mistake]] = {}
    for each in surest_first:
        of_pair.setdefault((each.label, each.predicted), []).append(each)
        of_class.setdefault(each.label, []).append(each)
    rare = sorted(
        (label for label in of_class if shots_of_classes[label] != SHOTS[0]), key=lambda label: class_counts[label]
    )
    return Mistakes(
        [of_pair[own, other][:OF_A_PAIR] for own, other, *_ in confusions[:MOST_PAIRS]],
        list(islice((each for label in rare for each in of_class[label][:OF_A_CLASS]), MOST_OF_THE_TAIL)),
    )

"""Which misclassified images are kept for a look."""

import torch

from paco_ds.evaluation.mistakes import Mistake, mistakes
from paco_ds.evaluation.predictions import Predictions, confusions

COUNTS = [500, 50, 5]
SHOTS = ["many", "medium", "few"]


def found(labels, predicted, confidence):
    made = Predictions(
        torch.tensor(labels),
        torch.tensor(predicted),
        torch.tensor(confidence, dtype=torch.float64),
        torch.arange(100, 100 + len(labels)),
    )
    return mistakes(made, confusions(made, 3), COUNTS, SHOTS)


def test_a_confusion_has_its_three_surest_images():
    """The most frequent confusion first; the ids are those of the split."""
    got = found([0, 0, 0, 0, 0, 1, 2], [1, 1, 1, 1, 0, 2, 2], [0.5, 0.9, 0.6, 0.7, 1.0, 0.4, 0.9])
    assert [[each.image for each in pair] for pair in got.confused] == [[101, 103, 102], [105]]
    assert got.confused[1] == [Mistake(105, 1, 2, 0.4)]


def test_the_tail_is_asked_from_its_end_and_the_head_not_at_all():
    """Two images of a class at most, so that one class does not fill the page."""
    got = found([2, 2, 2, 1, 0], [0, 0, 1, 0, 1], [0.5, 0.8, 0.6, 0.9, 1.0])
    assert [each.image for each in got.tail] == [101, 102, 103]


def test_they_do_not_depend_on_the_order_of_the_images():
    """Ranks are gathered in another order; equal confidences are ordered by id."""
    labels, predicted, confidence, ids = (torch.tensor(c) for c in ([0] * 6, [1] * 6, [0.5] * 6, list(range(6))))
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    made, mixed = (Predictions(labels[at], predicted[at], confidence[at], ids[at]) for at in (torch.arange(6), order))
    pairs = confusions(made, 3)
    assert mistakes(made, pairs, COUNTS, SHOTS) == mistakes(mixed, pairs, COUNTS, SHOTS)


def test_names_stand_for_classes_in_metrics_json():
    """As in its confusions."""
    got = found([2], [0], [0.75]).to_json(["a", "b", "c"])
    one = {"image": 100, "class": "c", "taken_for": "a", "confidence": 0.75}
    assert got == {"confused": [[one]], "tail": [one]}

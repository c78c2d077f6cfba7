"""Figures of single predictions against scikit-learn, torchmetrics and figures worked out by hand."""

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score
from torchmetrics.functional.classification import multiclass_calibration_error

from paco_ds.distributed.ranks import Ranks
from paco_ds.evaluation.predictions import Predictions, Recorder, accuracy_by_distribution, confusions, detail

COUNTS = [50, 20, 10, 5, 2, 1]


def made(images=500, classes=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    logits = torch.randn(images, classes, generator=generator)
    logits[torch.arange(images), labels] += 1.0
    return logits, labels


def recorded(logits, labels, valid=None):
    recorder = Recorder()
    valid = torch.ones_like(labels, dtype=torch.bool) if valid is None else valid
    ids = torch.arange(len(labels))
    for part in zip(logits.split(64), labels.split(64), ids.split(64), valid.split(64), strict=True):
        recorder.add(*part)
    return recorder.gather(Ranks(0, 1, 0, torch.device("cpu")))


def test_figures_equal_sklearn_and_torchmetrics():
    """Balanced accuracy, macro F1 and expected calibration error."""
    logits, labels = made()
    figures = detail(recorded(logits, labels), COUNTS)
    assert figures.balanced == pytest.approx(balanced_accuracy_score(labels, logits.argmax(1)))
    assert figures.macro_f1 == pytest.approx(f1_score(labels, logits.argmax(1), average="macro"))
    expected = multiclass_calibration_error(logits.softmax(1), labels, num_classes=6, n_bins=15)
    assert figures.calibration_error == pytest.approx(expected.item(), abs=1e-6)


def test_a_class_that_was_only_predicted_lowers_f1():
    """As scikit-learn counts: class 2 has no image, but took one."""
    labels, predicted = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 2])
    figures = detail(Predictions(labels, predicted, torch.ones(4), torch.arange(4)), [3, 2, 1])
    assert figures.macro_f1 == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert figures.balanced == 0.75


def test_padding_takes_no_part():
    """Rows that are not valid change nothing."""
    logits, labels = made(100)
    padded = recorded(torch.cat([logits, logits]), torch.cat([labels, labels]), torch.arange(200) < 100)
    assert torch.equal(padded.predicted_N, recorded(logits, labels).predicted_N)


def test_confusions_come_by_what_they_cost():
    """Two pairs, the one of more images first, with its share of the class."""
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    predicted = torch.tensor([1, 1, 0, 0, 2, 1, 2])
    found = confusions(Predictions(labels, predicted, torch.ones(7), torch.arange(7)), 3)
    assert found == [(0, 1, 2, 0.5), (1, 2, 1, 0.5)]


@pytest.mark.parametrize("most", [1, 7, 1000])
def test_confusions_are_the_largest_of_sklearns_matrix(most):
    """As many as asked for, off the diagonal, most images first, whatever the order of the images."""
    logits, labels = made(images=300, classes=9)
    predictions = recorded(logits, labels)
    matrix = confusion_matrix(labels, logits.argmax(1), labels=range(9))
    pairs = [(i, j, int(matrix[i, j])) for i in range(9) for j in range(9) if i != j and matrix[i, j]]
    assert 7 < len(pairs) < 1000
    largest = sorted(pairs, key=lambda pair: (-pair[2], pair[:2]))[:most]
    assert confusions(predictions, 9, most) == [(i, j, n, pytest.approx(n / matrix[i].sum())) for i, j, n in largest]


def test_the_test_distributions_run_from_head_to_tail():
    """A classifier that knows the head alone does best forward; uniform is the balanced accuracy; by hand at rho 50."""
    accuracy = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    figures = accuracy_by_distribution(accuracy, [100, 10, 1])
    assert figures["uniform"] == pytest.approx(1 / 3)
    weights = [1, 50**-0.5, 50**-1]
    assert figures["forward-50"] == pytest.approx(1 / sum(weights))
    assert figures["backward-50"] == pytest.approx(weights[2] / sum(weights))
    assert list(figures.values()) == sorted(figures.values(), reverse=True)


def test_classes_without_test_images_take_no_part_in_any_distribution():
    """nan is left out."""
    figures = accuracy_by_distribution(torch.tensor([0.5, float("nan")], dtype=torch.float64), [10, 1])
    assert set(figures.values()) == {0.5}


def test_nothing_to_judge_gives_none():
    """An empty split."""
    empty = torch.zeros(0, dtype=torch.int64)
    figures = detail(Predictions(empty, empty, torch.zeros(0), empty), [2, 1])
    assert (figures.balanced, figures.macro_f1, figures.calibration_error) == (None, None, None)
    assert figures.test_agnostic == {}


def test_a_temperature_is_not_fitted_on_another_test_set(capsys):
    from paco_ds.evaluate import main as evaluate

    with pytest.raises(SystemExit) as raised:
        evaluate(["--run", "run", "--data", "other", "--fit-temperature"])
    assert raised.value.code == 2
    assert "--fit-temperature is of one run as it was trained" in capsys.readouterr().err

"""Counts and accuracies against torchmetrics, scikit-learn and figures worked out by hand."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score
from torchmetrics.classification import MulticlassAccuracy

from paco_ds.command import Screen
from paco_ds.evaluation.accuracy import ClassCounts, shot_accuracy

SHOTS_12 = ["many"] * 3 + ["medium"] * 4 + ["few"] * 5


def _batch(images: int = 400, classes: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels_B = torch.randint(classes, (images,), generator=generator)
    logits_BC = torch.randn(images, classes, generator=generator)
    logits_BC[torch.arange(images), labels_B] += 1.0
    return logits_BC, labels_B


def _counted(logits_BC: torch.Tensor, labels_B: torch.Tensor) -> ClassCounts:
    counts = ClassCounts.zeros(logits_BC.shape[1])
    counts.add(logits_BC, labels_B, torch.ones_like(labels_B, dtype=torch.bool))
    return counts


def test_figures_equal_torchmetrics_and_sklearn() -> None:
    """Per class, per shot and All, top-1 and top-5, agree with two independent implementations."""
    logits_BC, labels_B = _batch()
    got = shot_accuracy(_counted(logits_BC, labels_B), SHOTS_12)
    by_class = {k: MulticlassAccuracy(12, top_k=k, average="none")(logits_BC, labels_B) for k in (1, 5)}
    assert got.per_class == pytest.approx(by_class[1].tolist())
    for shot, classes in (("many", slice(0, 3)), ("medium", slice(3, 7)), ("few", slice(7, 12))):
        assert got.top1()[shot] == pytest.approx(by_class[1][classes].mean().item())
        assert got.top5[shot] == pytest.approx(by_class[5][classes].mean().item())
    assert got.all == pytest.approx(top_k_accuracy_score(labels_B, logits_BC, k=1))
    assert got.top5["all"] == pytest.approx(top_k_accuracy_score(labels_B, logits_BC, k=5))
    one_shot = shot_accuracy(_counted(logits_BC, labels_B), ["many"] * 12)
    assert one_shot.many == pytest.approx(balanced_accuracy_score(labels_B, logits_BC.argmax(1)))


def test_padding_takes_no_part_whatever_it_holds() -> None:
    """Rows marked invalid change nothing, with a label of -1 and logits of NaN."""
    logits_BC, labels_B = _batch(20)
    padded = ClassCounts.zeros(12)
    valid_B = torch.arange(23) < 20
    padded.add(
        torch.cat((logits_BC, torch.full((3, 12), torch.nan))),
        torch.cat((labels_B, torch.full((3,), -1))),
        valid_B,
    )
    assert torch.equal(padded.as_tensor(), _counted(logits_BC, labels_B).as_tensor())


def test_sum_of_rank_counts_is_the_whole_split() -> None:
    """Adding the tensors of two ranks gives the counts of one."""
    logits_BC, labels_B = _batch(50)
    parts = [_counted(logits_BC[i::2], labels_B[i::2]).as_tensor() for i in range(2)]
    assert parts[0].dtype == torch.int64
    summed = ClassCounts.from_tensor(parts[0] + parts[1])
    assert torch.equal(summed.as_tensor(), _counted(logits_BC, labels_B).as_tensor())


def test_fewer_than_five_classes_have_a_top_c() -> None:
    """With three classes every image is in the top three."""
    got = shot_accuracy(_counted(*_batch(30, 3)), ["many", "many", "few"])
    assert got.top5 == {"many": 1.0, "medium": None, "few": 1.0, "all": 1.0}


def test_equal_or_undefined_logits_earn_nothing() -> None:
    """A constant classifier recognises one class of ten, and NaN logits none."""
    labels_B = torch.arange(10)
    constant = shot_accuracy(_counted(torch.zeros(10, 10), labels_B), ["many"] * 10)
    assert (constant.all, constant.top5["all"]) == (0.1, 0.5)
    undefined = shot_accuracy(_counted(torch.full((10, 10), torch.nan), labels_B), ["many"] * 10)
    assert (undefined.all, undefined.top5["all"]) == (0.0, 0.0)


def test_shot_is_over_classes_and_all_over_images() -> None:
    """Two classes of 9 and 1 images, the small one missed: the shot has 50 %, All 90 %."""
    labels_B = torch.tensor([0] * 9 + [1])
    logits_BC = torch.tensor([[1.0, 0.0, 0.0]]).expand(10, 3)
    got = shot_accuracy(_counted(logits_BC, labels_B), ["many", "many", "few"])
    assert (got.many, got.medium, got.few, got.all) == (0.5, None, None, 0.9)
    assert got.per_class == [1.0, 0.0, None]


def test_json_form_and_table_hold_the_four_figures() -> None:
    """to_json is plain JSON under metrics.json's keys; the table prints percent and a dash for None."""
    got = shot_accuracy(_counted(*_batch(30, 3)), ["many", "many", "few"])
    assert list(json.loads(json.dumps(got.to_json()))) == [
        "many",
        "medium",
        "few",
        "all",
        "top5",
        "per_class",
    ]
    out = io.StringIO()
    Screen(out, width=80).print(got.table("test split"))
    text = out.getvalue()
    assert all(
        word in text for word in ("test split", "Many", "Medium", "Few", "All", "top-1", "top-5", "100.0", " - ")
    )


def test_a_line_of_a_training_has_percent_and_what_else_there_is_to_say() -> None:
    """A dash for a shot without images; experts and images left out only where there are any."""
    labels_B, logits_BC = torch.tensor([0] * 9 + [1]), torch.tensor([[1.0, 0.0, 0.0]]).expand(10, 3)
    got = shot_accuracy(_counted(logits_BC, labels_B), ["many", "many", "few"])
    line = "many 50.0  medium -  few -  all 90.0"
    assert got.one_line() == line
    more = replace(got, images_by_experts=[5, 5], left_out=["a"])
    assert more.one_line() == f"{line}  experts 1.50  1 unreadable images left out"


@pytest.mark.parametrize(
    ("shots", "message"),
    [(["many"], "1 shots given for 3 classes"), (["many", "lots", "few"], "unknown shot 'lots'")],
)
def test_shots_that_do_not_fit_are_refused(shots: list[str], message: str) -> None:
    """A wrong number of shots or a wrong name is named."""
    with pytest.raises(ValueError, match=message):
        shot_accuracy(ClassCounts.zeros(3), shots)


def test_label_outside_the_classes_is_refused() -> None:
    """A label of another class list is an error, not a count somewhere."""
    with pytest.raises(ValueError, match=r"label 3 is outside 0\.\.2"):
        _counted(torch.zeros(1, 3), torch.tensor([3]))
    with pytest.raises(ValueError, match="logits have 4 classes, the counts 3"):
        ClassCounts.zeros(3).add(torch.zeros(1, 4), torch.tensor([0]), torch.tensor([True]))


def test_experts_used_are_told_where_routers_decide() -> None:
    """The mean over images, in metrics.json and under the table; nothing without routers."""
    plain = shot_accuracy(_counted(*_batch()), SHOTS_12)
    routed = replace(plain, images_by_experts=[10, 20, 10])
    assert routed.to_json() == {**plain.to_json(), "experts_used": 2.0, "images_by_experts": [10, 20, 10]}
    assert replace(plain, images_by_experts=[0, 0, 0]).experts_used is None
    printed = {}
    for name, accuracy in (("plain", plain), ("routed", routed)):
        page = io.StringIO()
        Screen(page, width=80).print(accuracy.table())
        printed[name] = page.getvalue()
    assert "2.00 of 3 experts an image" in printed["routed"]
    assert "experts" not in printed["plain"]

"""The loss of MDCS against a transcription of the authors' code (fistyee/MDCS, model/loss.py and base_trainer.py)."""

import math

import pytest
import torch
from torch.nn import functional as F

from paco_ds.config.loss import LossSettings
from paco_ds.errors import RecipeError
from paco_ds.losses import Anchors, make_loss
from tests.recipes import tiny_recipe

COUNTS = [50, 20, 30, 2, 7]
IMAGES = torch.tensor([0, 1, 4, 3, 2, 0, 1])
LABELS = IMAGES.repeat(2)
TAUS = (-0.5, 1.0, 2.5)


def logits(surely_right: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(3, len(LABELS), len(COUNTS), dtype=torch.float64, generator=generator)
    return (z + 30 * F.one_hot(LABELS, len(COUNTS)) * surely_right).requires_grad_()


def published(logits_EBC: torch.Tensor, epoch: int) -> torch.Tensor:
    """`MDCSLoss`: counts where ours has shares; its epochs count from 1."""
    loss = torch.zeros((), dtype=torch.float64)
    m = len(IMAGES)
    for z, power in zip(logits_EBC, TAUS, strict=True):
        adjusted = z + torch.tensor([math.log(n**power + 1e-9) for n in COUNTS], dtype=torch.float64)
        teacher, student = adjusted[:m].softmax(1).detach(), adjusted[m:].log_softmax(1)
        right = teacher.argmax(1) == IMAGES
        if right.sum() > 0:
            divergence = F.kl_div(student[right], teacher[right], reduction="batchmean")
            loss = loss + 0.6 * divergence * min((epoch + 1) / 20, 1.0)
        loss = loss + F.cross_entropy(adjusted, LABELS)
    return loss


def loss_of(epoch: int = 0, **settings):
    loss = make_loss(LossSettings.model_validate({"method": "mdcs", "mdcs": settings}), COUNTS)
    loss.begin_epoch(epoch)
    return loss


@pytest.mark.parametrize("epoch", [0, 7, 19, 300])
@pytest.mark.parametrize("surely_right", [False, True], ids=["some_right", "all_right"])
def test_is_the_published_loss(epoch, surely_right):
    """Value and gradient, as the weight of the self-distillation rises over 20 epochs."""
    z = logits(surely_right)
    output, expected = loss_of(epoch)(Anchors(LABELS, z)), published(z, epoch)
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=1e-7)
    ours, theirs = (torch.autograd.grad(loss, z)[0] for loss in (output.loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_wrong_teachers_teach_nothing():
    """No image whose weak view is right: the softmax terms alone, and no 0 / 0."""
    z = (logits().detach() - 90 * F.one_hot(LABELS, len(COUNTS))).requires_grad_()
    output = loss_of(300)(Anchors(LABELS, z))
    assert output.parts["consistency"] == 0
    assert output.loss == output.parts["softmax"]
    assert torch.autograd.grad(output.loss, z)[0].isfinite().all()


def test_weak_views_get_no_gradient_of_the_distillation():
    """They are the teacher; equal views have no divergence."""
    z = logits(True)
    weak = torch.autograd.grad(loss_of(300)(Anchors(LABELS, z)).loss, z)[0][:, : len(IMAGES)]
    alone = torch.autograd.grad(loss_of(weight=0.0)(Anchors(LABELS, z)).loss, z)[0][:, : len(IMAGES)]
    assert torch.equal(weak, alone)
    same = z.detach()[:, : len(IMAGES)].repeat(1, 2, 1)
    assert float(loss_of(300)(Anchors(LABELS, same)).parts["consistency"]) == pytest.approx(0, abs=1e-12)


def test_the_epoch_alone_decides():
    """Told an earlier epoch, as after a resume, it is what it was then; without a rise no epoch matters."""
    loss, z = loss_of(), logits(True)
    values = []
    for epoch in (0, 5, 0):
        loss.begin_epoch(epoch)
        values.append(float(loss(Anchors(LABELS, z)).loss.detach()))
    assert values[0] == values[2] != values[1]
    assert loss.changes_with_epoch
    assert not loss_of(ramp_epochs=0).changes_with_epoch
    assert loss_of(ramp_epochs=0).current_weight == 0.6


def test_what_does_not_fit_is_refused():
    """One view, labels that mix, another number of experts."""
    with pytest.raises(ValueError, match="two views of each image, got 13 rows"):
        loss_of()(Anchors(LABELS[1:], logits()[:, 1:]))
    with pytest.raises(RecipeError, match=r"set step\.mixup to 0"):
        tiny_recipe("loss.method=mdcs", "model.experts=3", "step.mixup=0.4")
    with pytest.raises(RecipeError, match="3 numbers for 2 experts"):
        tiny_recipe("loss.method=mdcs", "model.experts=2")


def test_a_run_makes_both_views_and_neither_projection_nor_queue():
    """One encoder sees them."""
    recipe = tiny_recipe("loss.method=mdcs", "model.experts=3")
    assert len(recipe.training_views) == 2
    assert recipe.runs_both_views
    assert recipe.keys_from is None

"""SADE's loss against a transcription of the authors' code (Vanint/SADE-AgnosticLT, model/loss.py)."""

import math

import pytest
import torch
from torch.nn import functional as F

from paco_ds.config.loss import LossSettings
from paco_ds.errors import RecipeError
from paco_ds.losses import Anchors, make_loss
from paco_ds.losses.sade import reversed_prior
from tests.recipes import tiny_recipe

COUNTS = [50, 20, 30, 2, 7]
LABELS = torch.tensor([0, 1, 4, 3, 2, 0])


def logits() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, len(LABELS), len(COUNTS), dtype=torch.float64, generator=generator).requires_grad_()


def published(logits_EBC: torch.Tensor, tau: float) -> torch.Tensor:
    """`DiverseExpertLoss`, image by image; its 1e-9 beside a share changes a logit by less than 1e-7 here."""
    prior = [n / sum(COUNTS) for n in COUNTS]
    by_rank = sorted(range(len(prior)), key=prior.__getitem__)
    inverse = {c: prior[by_rank[len(prior) - 1 - rank]] for rank, c in enumerate(by_rank)}
    uniform = torch.tensor([math.log(q + 1e-9) for q in prior], dtype=torch.float64)
    reverse = torch.tensor([math.log(inverse[c] + 1e-9) for c in range(len(prior))], dtype=torch.float64)
    backward = uniform - tau * reverse
    adjusted = (logits_EBC[0], logits_EBC[1] + uniform, logits_EBC[2] + backward)
    return torch.stack([F.cross_entropy(z, LABELS) for z in adjusted]).sum()


@pytest.mark.parametrize("tau", [2.0, 1.0, 0.0])
def test_is_the_published_sum(tau):
    """Value and gradient: softmax, Balanced Softmax, and the reverse prior with tau."""
    z = logits()
    output = make_loss(LossSettings.model_validate({"method": "sade", "sade": {"tau": tau}}), COUNTS)(
        Anchors(LABELS, z)
    )
    expected = published(z, tau)
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=1e-7)
    ours, theirs = (torch.autograd.grad(loss, z)[0] for loss in (output.loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert float(sum(output.parts.values())) == pytest.approx(float(output.loss.detach()))


def test_the_rarest_class_has_the_share_of_the_most_frequent():
    """Rank by rank; equal shares keep the order of their classes."""
    assert reversed_prior(torch.tensor([5.0, 2.0, 3.0])).tolist() == [2.0, 5.0, 3.0]
    assert reversed_prior(torch.tensor([4.0, 1.0, 1.0])).tolist() == [1.0, 4.0, 1.0]


def test_balanced_data_leave_only_cross_entropies():
    """Every bias is the same for all classes."""
    z = logits()
    output = make_loss(LossSettings(method="sade"), [7] * len(COUNTS))(Anchors(LABELS, z))
    torch.testing.assert_close(output.loss, sum(F.cross_entropy(each, LABELS) for each in z), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("experts", [[], ["model.experts=2"], ["model.experts=4"]])
def test_another_number_of_experts_is_refused(experts):
    """Each of the three has a loss of its own."""
    with pytest.raises(RecipeError, match=r"sade .*model\.experts is"):
        tiny_recipe("loss.method=sade", *experts)

"""Weights of experts by prediction stability, against a transcription of SADE's test-time training."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from paco_ds.config.model import ModelSettings
from paco_ds.errors import RecipeError
from paco_ds.evaluation.aggregation import (
    AS_IT_IS,
    Aggregated,
    WeightLearner,
    equal_weights,
    images_count,
    stability,
)
from paco_ds.models.output import ModelOutput

EXPERTS, BATCH, CLASSES, STEPS = 3, 16, 5, 6


def views(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of two views: the experts agree with themselves less and less."""
    generator = torch.Generator().manual_seed(seed)
    first = 3 * torch.randn(EXPERTS, BATCH, CLASSES, dtype=torch.float64, generator=generator)
    noise = torch.randn(EXPERTS, BATCH, CLASSES, dtype=torch.float64, generator=generator)
    return first, first + torch.tensor([0.3, 1.0, 3.0], dtype=torch.float64)[:, None, None] * noise


def labels(seed: int) -> torch.Tensor:
    return torch.randint(CLASSES, (BATCH,), generator=torch.Generator().manual_seed(seed))


def published(lr: float, weight_decay: float, steps: int) -> torch.Tensor:
    """`test_training` of Vanint/SADE-AgnosticLT, test_training_cifar.py, with the optimizer of training."""
    aggregation_weight = nn.Parameter(torch.full((3,), 1 / 3, dtype=torch.float64))
    optimizer = torch.optim.SGD([aggregation_weight], lr=lr, weight_decay=weight_decay, momentum=0.9, nesterov=True)
    cos = nn.CosineSimilarity(dim=1, eps=1e-6)
    for step in range(steps):
        output0, output1 = (z.transpose(0, 1) for z in views(step))
        weight = F.softmax(aggregation_weight, dim=0)
        aggregated0 = weight[0] * output0[:, 0] + weight[1] * output0[:, 1] + weight[2] * output0[:, 2]
        aggregated1 = weight[0] * output1[:, 0] + weight[1] * output1[:, 1] + weight[2] * output1[:, 2]
        loss = -cos(F.softmax(aggregated0, dim=1), F.softmax(aggregated1, dim=1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return F.softmax(aggregation_weight.detach(), dim=0)


def learner(*counting: torch.Tensor, lr: float = 0.1, weight_decay: float = 5e-4) -> WeightLearner:
    return WeightLearner(counting, EXPERTS, lr, weight_decay, add_up=lambda tensor: tensor)


@pytest.mark.parametrize(("lr", "weight_decay"), [(0.1, 5e-4), (0.025, 5e-4), (0.2, 2e-4)])
def test_takes_the_published_steps(lr, weight_decay):
    """CIFAR's, ImageNet-LT's and iNaturalist's learning rates; the stable expert gains."""
    ours = learner(torch.ones(CLASSES), lr=lr, weight_decay=weight_decay)
    for step in range(STEPS):
        ours.step(*views(step), labels(step))
    expected = published(lr, weight_decay, STEPS)
    torch.testing.assert_close(ours.weights_DE[0], expected, rtol=1e-12, atol=1e-12)
    assert expected[0] > expected[2]


def test_distributions_learn_side_by_side_as_alone():
    """Each with its own optimizer's state; an image of a class without a share does not count."""
    uniform, head = torch.ones(CLASSES), torch.tensor([1.0, 0.5, 0.1, 0.0, 0.0])
    together, alone = learner(uniform, head), (learner(uniform), learner(head))
    for step in range(STEPS):
        for each in (together, *alone):
            each.step(*views(step), labels(step))
    torch.testing.assert_close(together.weights_DE, torch.cat([each.weights_DE for each in alone]))
    assert not torch.allclose(together.weights_DE[0], together.weights_DE[1])


def test_parts_of_a_batch_give_the_step_of_the_whole():
    """Two ranks with eight images each, whose sums are added."""
    parts: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        parts.append(tensor)
        return tensor

    first, second = views(0)
    for half in (slice(0, 8), slice(8, 16)):
        part = WeightLearner([torch.ones(CLASSES)], EXPERTS, 0.1, 0.0, keep)
        part.step(first[:, half], second[:, half], labels(0)[half])
    summed = WeightLearner([torch.ones(CLASSES)], EXPERTS, 0.1, 0.0, lambda _: parts[0] + parts[1])
    whole = learner(torch.ones(CLASSES), weight_decay=0.0)
    for each in (whole, summed):
        each.step(first, second, labels(0))
    torch.testing.assert_close(summed.weights_DE, whole.weights_DE)


def test_stops_where_a_weight_falls_below_a_twentieth():
    """After the epoch, as published; the others go on."""
    ours = learner(torch.ones(CLASSES), torch.zeros(CLASSES), lr=100.0)
    ours.step(*views(0), labels(0))
    assert ours.weights_DE[0].min() < 0.045
    stopped = ours.weights_DE[0].clone()
    assert not ours.end_epoch()
    ours.step(*views(1), labels(1))
    assert torch.equal(ours.weights_DE[0], stopped)
    torch.testing.assert_close(ours.weights_DE[1], torch.full((3,), 1 / 3, dtype=torch.float64))


def test_equal_views_are_perfectly_stable():
    """And weights that choose one expert are that expert's similarity."""
    first, second = views(0)
    assert stability(torch.full((1, 3), 1 / 3), first, first).tolist() == [pytest.approx([1.0] * BATCH)]
    alone = F.cosine_similarity(first[1].softmax(1), second[1].softmax(1), dim=1)
    torch.testing.assert_close(stability(torch.tensor([[0.0, 1.0, 0.0]]), first, second)[0], alone)


def test_images_count_as_their_class_should():
    """In sum by class: the shares of the distribution; as it is each image counts once."""
    test, train = [10, 5, 20], [100, 10, 1]
    counting = images_count(test, train)
    assert counting[AS_IT_IS].tolist() == [1, 1, 1]
    assert (counting["forward-50"] * torch.tensor(test)).tolist() == pytest.approx([1, 50**-0.5, 1 / 50])
    assert (counting["backward-2"] * torch.tensor(test)).tolist() == pytest.approx([0.5, 2**-0.5, 1])
    assert (counting["uniform"] * torch.tensor(test)).tolist() == pytest.approx([1, 1, 1])


class Experts(nn.Module):
    def forward(self, images):
        return ModelOutput(None, views(0)[0].float())


def test_equal_weights_are_the_mean_and_others_their_sum():
    """What a run without aggregation answers."""
    z, images = views(0)[0].float(), torch.zeros(BATCH, 3, 4, 4)
    equal = equal_weights(ModelSettings(backbone="resnet50", experts=3))
    torch.testing.assert_close(Aggregated(Experts(), False, equal)(images).mean_logits(), z.mean(0))
    weighted = Aggregated(Experts(), False, torch.tensor([0.5, 0.25, 0.25]))(images).mean_logits()
    torch.testing.assert_close(weighted, 0.5 * z[0] + 0.25 * z[1] + 0.25 * z[2])


def test_a_run_without_experts_is_refused():
    """There is nothing to weigh, or routers have chosen already."""
    with pytest.raises(RecipeError, match=r"needs a run with model\.experts.*has none"):
        equal_weights(ModelSettings(backbone="resnet50"))
    with pytest.raises(RecipeError, match="has routers"):
        equal_weights(ModelSettings(backbone="resnet50", experts=3, trained="routers", start_from="experts"))

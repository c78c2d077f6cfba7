"""The routers' loss against its equation, and what it takes for help, in plain loops."""

import math
from typing import Any

import pytest
import torch

from paco_ds.losses.base import Anchors
from paco_ds.losses.routing import RoutingLoss, asking_further_helps

EXPERTS, BATCH, CLASSES = 4, 64, 3


def drawn(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(EXPERTS, BATCH, CLASSES, dtype=torch.float64, generator=generator)
    said = 3 * torch.randn(EXPERTS - 1, BATCH, dtype=torch.float64, generator=generator)
    return torch.randint(CLASSES, (BATCH,), generator=generator), logits, said.requires_grad_()


def helps(labels, logits, e, i):
    """Experts 1 to e are wrong together, and with more of them they are right at some point."""

    def right(count):
        mean = [sum(float(logits[j, i, c]) for j in range(count)) / count for c in range(CLASSES)]
        return mean.index(max(mean)) == int(labels[i])

    return not right(e) and any(right(later) for later in range(e + 1, EXPERTS + 1))


@pytest.mark.parametrize("weight", [1.0, 100.0])
def test_is_the_weighted_cross_entropy_of_asking_further(weight):
    """Value, gradient and the two shares; every router decides right somewhere and wrong elsewhere."""
    labels, logits, said = drawn(0)
    expected: Any = 0.0
    wanted, asked = 0, 0
    for e in range(1, EXPERTS):
        for i in range(BATCH):
            p = 1 / (1 + (-said[e - 1, i]).exp())
            target = helps(labels, logits, e, i)
            expected = expected - (weight * p.log() if target else (1 - p).log()) / (EXPERTS - 1) / BATCH
            wanted, asked = wanted + target, asked + bool(p > 0.5)
        assert 0 < sum(helps(labels, logits, e, i) for i in range(BATCH)) < BATCH
    output = RoutingLoss(weight)(Anchors(labels, logits, routers=said))
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(torch.autograd.grad(output.loss, said), torch.autograd.grad(expected, said))
    decisions = (EXPERTS - 1) * BATCH
    assert {name: float(part) for name, part in output.parts.items()} == pytest.approx(
        {"helps": wanted / decisions, "asks": asked / decisions}
    )


def test_help_is_what_the_mean_of_more_experts_puts_right():
    """By hand: right from the start; right with the second; right with the third alone; never."""
    z = torch.tensor(
        [
            [[2.0, 0, 0], [0, 1, 0], [0, 1, 0], [0, 9, 0]],
            [[0.0, 1, 0], [2, 0, 0], [0, 0, 0], [1, 0, 0]],
            [[0.0, 0, 9], [0, 0, 9], [2, 0, 0], [1, 0, 0]],
        ]
    )
    expected = [[False, True, True, False], [False, False, True, False]]
    assert asking_further_helps(z, torch.zeros(4, dtype=torch.int64)).tolist() == expected


def test_no_gradient_reaches_the_experts():
    """They are frozen, whatever trains them."""
    labels, logits, said = drawn(1)
    loss = RoutingLoss()(Anchors(labels, logits.requires_grad_(), routers=said)).loss
    assert torch.autograd.grad(loss, logits, allow_unused=True) == (None,)
    assert math.isfinite(loss.item())


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 5, 3), (0, 5)), "two experts or more"),
        (((5, 3), (0, 5)), "two experts or more"),
        (((3, 5, 3), (3, 5)), r"needs a logit of each router for each image, \(2, 5\), got \(3, 5\)"),
        (((3, 5, 3), None), r"\(2, 5\), got None"),
        (((3, 4, 3), (2, 5)), "one row for each of 5 labels"),
    ],
)
def test_refuses_what_are_no_routers_of_experts(shapes, message):
    """One expert, none, a router too many, no router, other images."""
    logits, said = (None if shape is None else torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        RoutingLoss()(Anchors(torch.zeros(5, dtype=torch.int64), logits, routers=said))


def test_refuses_a_weight_of_nothing():
    """In a loop of one's own."""
    with pytest.raises(ValueError, match="positive_weight must be above 0"):
        RoutingLoss(0.0)

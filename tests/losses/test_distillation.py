"""What a teacher adds to a loss, against its equation in plain loops in float64."""

import pytest
import torch

from paco_ds.config.loss import DistillSettings, LossSettings
from paco_ds.losses import make_loss
from paco_ds.losses.base import Anchors, LossOutput
from paco_ds.losses.distillation import Distillation, divergence_from_teacher

BATCH, CLASSES, EXPERTS = 5, 4, 3


def drawn(*shape, seed):
    return 3 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def transcribed(student, teacher, temperature):
    """T^2 mean_i sum_c t_c (log t_c - log p_c)."""
    total = torch.zeros((), dtype=torch.float64)
    for z, t in zip(student, teacher, strict=True):
        p, q = (z / temperature).exp(), (t / temperature).exp()
        p, q = p / sum(p), q / sum(q)
        total = total + sum(q[c] * (q[c].log() - p[c].log()) for c in range(CLASSES))
    return temperature**2 * total / len(student)


@pytest.mark.parametrize("experts", [None, EXPERTS])
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_is_the_divergence_of_the_students_mean_from_the_teacher(experts, temperature):
    """Value and gradient, of experts with respect to each."""
    z = drawn(*([experts] if experts else []), BATCH, CLASSES, seed=0).requires_grad_()
    teacher = drawn(BATCH, CLASSES, seed=1)
    ours = divergence_from_teacher(z, teacher, temperature)
    expected = transcribed(sum(z) / EXPERTS if experts else z, teacher, temperature)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours, z), torch.autograd.grad(expected, z))
    assert torch.autograd.gradcheck(lambda logits: divergence_from_teacher(logits, teacher, temperature), z)


def test_adds_its_weight_to_any_method_and_shows_itself():
    """The method's own loss and parts stay; of two views the teacher is asked about each."""
    z, labels = drawn(EXPERTS, BATCH, CLASSES, seed=0).requires_grad_(), torch.arange(BATCH) % CLASSES
    loss = make_loss(LossSettings(method="ride"), [9, 5, 2, 1])
    method: LossOutput = loss(Anchors(labels, z))
    answers = {1: drawn(2, CLASSES, seed=1), 2: drawn(3, CLASSES, seed=2)}
    distillation = Distillation(DistillSettings(teacher="run", weight=0.5, temperature=2.0), lambda x: answers[int(x)])
    taught = distillation(method, z, torch.tensor(1), torch.tensor(2))
    expected = transcribed(z.mean(0), torch.cat([answers[1], answers[2]]), 2.0)
    torch.testing.assert_close(taught.loss, method.loss + 0.5 * expected)
    assert dict(taught.parts) == {**method.parts, "distillation": pytest.approx(expected.item())}
    assert taught.center_probability_B is method.center_probability_B


def test_a_student_that_is_its_teacher_learns_nothing():
    """0, with gradient 0, also where it is sure beyond float32."""
    z = (200 * torch.eye(CLASSES)).requires_grad_()
    value = divergence_from_teacher(z, z.detach(), 1.5)
    (grad,) = torch.autograd.grad(value, z)
    assert value == 0
    assert grad.abs().max() < 1e-6


def test_is_float32_under_autocast():
    """From bfloat16 logits of both."""
    z, teacher = drawn(BATCH, CLASSES, seed=0), drawn(BATCH, CLASSES, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = divergence_from_teacher(z.bfloat16(), teacher.bfloat16(), 1.5)
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(float(divergence_from_teacher(z, teacher, 1.5)), rel=0.05)


def test_refuses_a_teacher_of_other_classes():
    """Both shapes are named."""
    with pytest.raises(ValueError, match=r"teacher's logits are \(5, 7\), the student's \(5, 4\)"):
        divergence_from_teacher(torch.zeros(5, 4), torch.zeros(5, 7), 1.0)

"""SGD with its guard, and the schedule as arithmetic."""

import math

import pytest
import torch

from paco_ds.config.load import load_recipe
from paco_ds.errors import RecipeError
from paco_ds.training.optimizer import UsualNorm, learning_rate
from paco_ds.training.skipping_optimizers import GuardedAdamW, GuardedSGD
from tests.recipes import tiny_recipe


def make(clip_norm=None, **sgd):
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    return weight, GuardedSGD([weight], 0.1, clip_norm=clip_norm, whole=True, momentum=0.9, weight_decay=0.01, **sgd)


@pytest.mark.parametrize("nesterov", [False, True])
def test_it_is_torchs_sgd_when_nothing_is_wrong(nesterov):
    """Three steps, bit for bit."""
    weight, guarded = make(nesterov=nesterov)
    other = torch.nn.Parameter(weight.detach().clone())
    plain = torch.optim.SGD([other], 0.1, momentum=0.9, weight_decay=0.01, nesterov=nesterov)
    for number in range(3):
        weight.grad = torch.tensor([1.0, -2.0]) * (number + 1)
        other.grad = weight.grad.clone()
        guarded.step()
        plain.step()
        assert torch.equal(weight, other)
    assert float(guarded.grad_norm) == pytest.approx(3 * 5**0.5)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(wrong):
    """Weights and momentum stand; the refusal is told."""
    weight, optimizer = make()
    weight.grad = torch.tensor([1.0, 1.0])
    optimizer.step()
    before, momentum = weight.detach().clone(), optimizer.state[weight]["momentum_buffer"].clone()
    weight.grad = torch.tensor([1.0, wrong])
    optimizer.step()
    assert not optimizer.applied
    assert torch.equal(weight, before)
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], momentum)


def adamw(weight):
    return GuardedAdamW([weight], 0.1, clip_norm=None, whole=True, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2)


def test_adamw_is_that_of_its_paper():
    """Loshchilov and Hutter 2019, Algorithm 2, five steps in float64; clipped, by a factor in float32."""
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64))
    optimizer = adamw(weight)
    optimizer.clip_norm = 4.0
    wanted, m, v = weight.detach().clone(), torch.zeros(3).double(), torch.zeros(3).double()
    for number in range(1, 6):
        gradient = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) * number
        weight.grad = gradient.clone()
        optimizer.step()
        gradient *= min(1.0, 4.0 / float(gradient.norm()))
        m, v = 0.8 * m + 0.2 * gradient, 0.95 * v + 0.05 * gradient**2
        step = (m / (1 - 0.8**number)) / ((v / (1 - 0.95**number)).sqrt() + 1e-3)
        wanted = wanted - 0.1 * (step + 0.2 * wanted)
    torch.testing.assert_close(weight.detach(), wanted, rtol=1e-7, atol=1e-7)
    state = optimizer.state[weight]
    torch.testing.assert_close((state["exp_avg"], state["exp_avg_sq"]), (m, v), rtol=1e-6, atol=1e-7)
    assert state["step"] == 5


def test_a_refused_step_of_adamw_changes_nothing():
    """Weights, both means and the number of steps; a refused first one leaves them at zero."""
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = adamw(weight)
    weight.grad = torch.tensor([1.0, float("nan")])
    optimizer.step()
    assert weight.tolist() == [1, 2]
    assert {name: t.any().item() for name, t in optimizer.state[weight].items()} == {
        "exp_avg": False, "exp_avg_sq": False, "step": False
    }  # fmt: skip
    weight.grad = torch.tensor([1.0, -1.0])
    optimizer.step()
    before = {name: t.clone() for name, t in optimizer.state[weight].items()} | {"weight": weight.detach().clone()}
    weight.grad = torch.tensor([float("inf"), 1.0])
    optimizer.step()
    assert not optimizer.applied
    for name, value in (*optimizer.state[weight].items(), ("weight", weight.detach())):
        assert torch.equal(value, before[name]), name


def test_a_norm_is_judged_by_the_geometric_mean_of_the_last_hundred():
    """From the twentieth step on; it follows a norm that falls, and a state goes on bit for bit."""
    usual, yes, no = UsualNorm(), torch.tensor(True), torch.tensor(False)

    def norm(value):
        return torch.tensor(value, dtype=torch.float64)

    for _ in range(19):
        usual.add(norm(2.0), yes)
    assert math.isnan(usual.ratio(norm(2.0)))
    usual.add(norm(2.0), yes)
    assert float(usual.ratio(norm(50.0))) == pytest.approx(25.0)
    usual.add(norm(float("inf")), no)
    usual.add(norm(0.0), yes)
    assert usual.state() == {"log_mean": pytest.approx(math.log(2)), "steps": 20}
    for _ in range(1000):
        usual.add(norm(0.02), yes)
    assert float(usual.ratio(norm(0.02))) == pytest.approx(1.0, rel=1e-3)
    assert UsualNorm(**usual.state()).ratio(norm(0.3)) == usual.ratio(norm(0.3))


def test_a_step_whose_norm_is_refused_changes_nothing():
    """The guard is asked once the norm is known."""
    weight, optimizer = make(clip_norm=1.0)
    optimizer.norm_guard = lambda: optimizer.grad_norm <= 4
    weight.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert not optimizer.applied
    assert torch.equal(weight, torch.tensor([1.0, 2.0]))
    weight.grad = torch.tensor([0.3, 0.4])
    optimizer.step()
    assert optimizer.applied
    assert not torch.equal(weight, torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_first_step_that_is_refused_leaves_a_momentum_of_zero(momentum):
    """Not memory without a value; the second is then torch's first."""
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = GuardedSGD([weight], 0.1, clip_norm=None, whole=True, momentum=momentum)
    for gradient in ([float("inf"), 1.0], [1.0, -1.0]):
        weight.grad = torch.tensor(gradient)
        optimizer.step()
    assert torch.allclose(weight, torch.tensor([0.9, 2.1]))
    assert ("momentum_buffer" in optimizer.state[weight]) == (momentum > 0)


def test_clipping_scales_to_the_norm_and_reports_the_norm_before():
    """Only a larger gradient is touched."""
    weight, optimizer = make(clip_norm=1.0)
    weight.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    torch.testing.assert_close(weight.grad, torch.tensor([0.6, 0.8]))
    assert optimizer.grad_norm == 5.0
    weight.grad = torch.tensor([0.3, 0.4])
    optimizer.step()
    assert torch.equal(weight.grad, torch.tensor([0.3, 0.4]))


def test_the_published_schedule_changes_by_epoch():
    """Linear warm-up to the peak, then lr / 2 (1 + cos(pi (e - w + 1) / (E - w + 1)))."""
    recipe = tiny_recipe("schedule.per=epoch", "schedule.epochs=400", "schedule.warmup_epochs=10", "optimizer.lr=0.02")
    rates = [learning_rate(recipe.schedule, recipe.lr, 7 * epoch + 3, steps_per_epoch=7) for epoch in range(400)]
    assert rates[0] == pytest.approx(0.002)
    assert rates[9] == pytest.approx(0.02)
    for e in (10, 11, 200, 399):
        assert rates[e] == pytest.approx(0.01 * (1 + math.cos(math.pi * (e - 9) / 391)))
    assert rates[399] < 1e-6 < rates[390]
    assert (
        learning_rate(recipe.schedule, recipe.lr, 0, 7)
        == learning_rate(recipe.schedule, recipe.lr, 6, 7)
        != learning_rate(recipe.schedule, recipe.lr, 7, 7)
    )


def test_by_step_the_same_curve_is_followed_finely():
    """Never rising after warm-up, the peak reached once."""
    recipe = tiny_recipe("schedule.per=step", "schedule.epochs=20", "schedule.warmup_epochs=2", "optimizer.lr=0.1")
    rates = [learning_rate(recipe.schedule, recipe.lr, step, steps_per_epoch=10) for step in range(200)]
    assert max(rates) == rates[19] == pytest.approx(0.1)
    assert rates[:20] == sorted(rates[:20])
    assert rates[19:] == sorted(rates[19:], reverse=True)
    assert 0 < rates[-1] < 1e-4


def test_the_cosine_ends_at_the_minimum():
    """From the peak down, the more steps the nearer; warm-up is as without."""
    cosine = ("schedule.per=step", "schedule.epochs=20", "schedule.warmup_epochs=2", "optimizer.lr=0.1")
    plain, raised = (tiny_recipe(*cosine, f"schedule.minimum_lr={low}") for low in (0.0, 0.01))
    for step in range(200):
        without = learning_rate(plain.schedule, 0.1, step, 10)
        wanted = without if step < 20 else 0.01 + without * 0.9
        assert learning_rate(raised.schedule, 0.1, step, 10) == pytest.approx(wanted)


def test_the_learning_rate_of_256_images_is_scaled_to_those_of_a_step_once():
    """In place of the factor that step.lr_scaling gives a run of other size."""
    step = ("step.micro_batch=16", "step.micro_batches=8", "step.reference_micro_batches=4")
    assert tiny_recipe(*step, "optimizer.lr=0.1").lr == pytest.approx(0.2)
    assert tiny_recipe(*step, "optimizer.lr=0.1", "optimizer.lr_per_256=true").lr == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("optimizer.betas=[0.9, 0.95]",), r"betas \(0.9, 0.95\) is not of sgd.*leave betas out, or set name to adamw"),
        (("optimizer.eps=0.1",), r"eps 0.1 is not of sgd"),
        (("optimizer.name=adamw", "optimizer.momentum=0.5"), r"momentum 0.5 is not of adamw.*set name to sgd"),
        (("optimizer.name=adamw", "optimizer.nesterov=true"), r"nesterov True is not of adamw"),
        (("optimizer.name=lion",), r"'optimizer.name': .*'sgd', 'adamw', 'lars' or 'muon'"),
        (("optimizer.name=lars", "optimizer.betas=[0.9, 0.95]"), r"of lars.*set name to adamw or muon"),
        (("optimizer.name=muon", "optimizer.trust_coefficient=1"), r"trust_coefficient 1.0 is not of muon.*to lars"),
        (("optimizer.lr_per_256=true", "step.lr_scaling=none"), r"lr_per_256 and step.lr_scaling none both say"),
        (("schedule.minimum_lr=0.05",), r"minimum_lr 0.05 is not below the peak learning rate 0.05"),
        (("schedule.minimum_lr=0.01", "schedule.milestones=[1]"), r"minimum_lr 0.01 ends the cosine, in whose place"),
        (("optimizer.layer_decay=1.5",), r"'optimizer.layer_decay': .*less than or equal to 1"),
    ],
)
def test_settings_that_do_not_fit_the_optimizer_are_refused_by_name(overrides, message):
    """With what to do."""
    with pytest.raises(RecipeError, match=message):
        tiny_recipe(*overrides)


def test_nesterov_needs_momentum():
    """There is nothing to look along without."""
    with pytest.raises(RecipeError, match="momentum, which is 0: set momentum or leave nesterov out"):
        tiny_recipe("optimizer.nesterov=true", "optimizer.momentum=0")


def test_the_published_cifar_schedule_overshoots_once():
    """dvlab-research's paco_cifar.py, written out: `<=` after warm-up, `>` at the milestones."""

    def published(epoch, lr=0.05, warmup_epochs=10):
        if epoch <= warmup_epochs:
            return lr / warmup_epochs * (epoch + 1)
        return lr * (0.01 if epoch > 360 else 0.1 if epoch > 320 else 1)

    recipe = load_recipe("cifar100_lt_resnet32")
    ours = [learning_rate(recipe.schedule, recipe.lr, 7 * epoch + 2, 7) for epoch in range(400)]
    assert ours == pytest.approx([published(epoch) for epoch in range(400)])
    assert max(ours) == pytest.approx(0.055)

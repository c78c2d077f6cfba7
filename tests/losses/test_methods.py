"""Every method of the registry against the equation of its paper, written out in plain loops in float64."""

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from paco_ds.config.loss import LossSettings
from paco_ds.config.methods import METHODS
from paco_ds.config.methods.ride import RideSettings
from paco_ds.contrast.key_queue import QueueSnapshot
from paco_ds.errors import DataError, RecipeError
from paco_ds.losses import make_loss
from paco_ds.losses.balpoe import BalPoELoss
from paco_ds.losses.base import Anchors, Loss
from paco_ds.losses.bcl import BalancedContrastiveLoss
from paco_ds.losses.focal import FocalLoss
from paco_ds.losses.ldam import LdamLoss, margins
from paco_ds.losses.paco import ParametricContrastiveLoss
from paco_ds.losses.proco import ProCoLoss
from paco_ds.losses.von_mises_fisher import log_normaliser
from paco_ds.planning.trace import trace_step
from tests.recipes import tiny_recipe

COUNTS, CLASSES, DIM, BATCH, EXPERTS = [50, 20, 9, 3, 1], 5, 8, 6, 3
TOTAL = sum(COUNTS)
CLOSE: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-9}  # buffers by class are float32


def rows(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=generator), dim=-1)


def labels(size: int, seed: int) -> torch.Tensor:
    return torch.randint(CLASSES, (size,), generator=torch.Generator().manual_seed(seed))


Y = labels(BATCH, 4)


def logits(experts: int | None = None, scale: float = 3.0) -> torch.Tensor:
    shape = (BATCH, CLASSES) if experts is None else (experts, BATCH, CLASSES)
    return (scale * rows(*shape, seed=2)).requires_grad_()


OF_EXPERTS = ("ride", "routing", "balpoe", "sade", "mdcs")


def further(method: str) -> dict[str, torch.Tensor]:
    """Inputs of a method beyond queries, keys and queue: prototypes, or logits of the routers."""
    every = {
        "bcl": {"prototypes": rows(CLASSES, DIM, seed=7)},
        "routing": {"routers": rows(EXPERTS - 1, BATCH, seed=8)},
    }
    return every.get(method, {})


def loss_of(method: str, epoch: int = 0, **sections) -> Loss:
    loss = make_loss(LossSettings.model_validate({"method": method, **sections}), COUNTS)
    loss.begin_epoch(epoch)
    return loss


def log_softmax(z: list[torch.Tensor], label: int) -> torch.Tensor:
    return z[label] - sum(v.exp() for v in z).log()


def effective(beta: float) -> list[float]:
    e = [(1 - beta) / (1 - beta**n) for n in COUNTS]
    return [CLASSES * w / sum(e) for w in e]


def check(ours: torch.Tensor, expected: torch.Tensor, *inputs: torch.Tensor) -> None:
    """Value and gradients."""
    torch.testing.assert_close(ours, expected, **CLOSE)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs), torch.autograd.grad(expected, inputs), **CLOSE)


class TestSoftmax:
    @pytest.mark.parametrize(
        ("method", "sections", "tau"),
        [
            ("cross_entropy", {}, 0.0),
            ("balanced_softmax", {}, 1.0),
            ("logit_adjustment", {}, 1.0),
            ("logit_adjustment", {"logit_adjustment": {"tau": 1.7}}, 1.7),
        ],
    )
    def test_adds_tau_log_prior(self, method, sections, tau):
        """Cross-entropy of z + tau log q."""
        z = logits()
        expected: Any = 0.0
        for i, y in enumerate(Y.tolist()):
            adjusted = [z[i, c] + tau * math.log(COUNTS[c] / TOTAL) for c in range(CLASSES)]
            expected = expected - log_softmax(adjusted, y) / BATCH
        check(loss_of(method, **sections)(Anchors(Y, z)).loss, expected, z)

    def test_class_balanced_weighs_by_effective_numbers(self):
        """The mean is over images, not over weights."""
        z, weight = logits(), effective(0.99)
        expected = sum(-weight[y] * log_softmax(list(z[i]), y) for i, y in enumerate(Y.tolist())) / BATCH
        check(loss_of("class_balanced", class_balanced={"beta": 0.99})(Anchors(Y, z)).loss, expected, z)


class TestFocal:
    @pytest.mark.parametrize("balanced", [False, True])
    @pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
    def test_is_its_equation(self, gamma, balanced):
        """-(1 - p)^gamma log p, weighted or not; gamma 0 is cross-entropy."""
        z = logits()
        weight = effective(0.99) if balanced else [1.0] * CLASSES
        expected: Any = 0.0
        for i, y in enumerate(Y.tolist()):
            log_p = log_softmax(list(z[i]), y)
            expected = expected - weight[y] * (1 - log_p.exp()) ** gamma * log_p / BATCH
        loss = loss_of("focal", focal={"gamma": gamma, "class_balanced": balanced, "beta": 0.99})
        check(loss(Anchors(Y, z)).loss, expected, z)

    def test_is_finite_where_the_model_is_sure(self):
        """p = 1 in float32 has loss and gradient 0, also for a gamma below 1, whose power has no derivative there."""
        z = (200 * F.one_hot(Y, CLASSES)).float().requires_grad_()
        loss = FocalLoss(0.5, CLASSES)(Anchors(Y, z)).loss
        (grad,) = torch.autograd.grad(loss, z)
        assert loss == 0
        assert torch.equal(grad, torch.zeros_like(grad))


class TestLdam:
    @pytest.mark.parametrize(("epoch", "reweighted"), [(0, False), (2, False), (3, True), (9, True)])
    def test_is_its_equation_and_reweights_from_its_epoch_on(self, epoch, reweighted):
        """Margins n^-1/4 with the largest .5, times the scale; then the weighted mean of Algorithm 1."""
        z = logits(scale=30.0)
        margin = [0.5 * n**-0.25 / min(COUNTS) ** -0.25 for n in COUNTS]
        weight = effective(0.99) if reweighted else [1.0] * CLASSES
        total: Any = 0.0
        weights = 0.0
        for i, y in enumerate(Y.tolist()):
            shifted = [z[i, c] - (30 * margin[c] if c == y else 0) for c in range(CLASSES)]
            total, weights = total - weight[y] * log_softmax(shifted, y), weights + weight[y]
        loss = loss_of("ldam", epoch, ldam={"drw_epoch": 3, "beta": 0.99})
        check(loss(Anchors(Y, z)).loss, total / weights, z)

    def test_epoch_alone_decides(self):
        """Told an earlier epoch, as after a resume from an older checkpoint, it is again what it was then."""
        loss, z = LdamLoss(COUNTS, drw_epoch=1), logits()
        values = []
        for epoch in (0, 1, 0):
            loss.begin_epoch(epoch)
            values.append(loss(Anchors(Y, z)).loss.item())
        assert values[0] == values[2] != values[1]
        assert not loss.state_dict()

    def test_margins_keep_the_rarest_class_furthest(self):
        """.5 for one image, .5 / 50^(1/4) for 50."""
        assert margins(COUNTS, 0.5).tolist() == pytest.approx([0.5 * n**-0.25 for n in COUNTS])


class TestRide:
    @pytest.mark.parametrize("base", ["ldam", "cross_entropy"])
    @pytest.mark.parametrize(("epoch", "late"), [(1, False), (2, True)])
    def test_is_its_equation(self, base, epoch, late):
        """The sum over experts; no gradient through their mean; weights and temperatures from an epoch on."""
        z = logits(EXPERTS, 5.0)
        margin = [(0.5 * n**-0.25 if base == "ldam" else 0.0) for n in COUNTS]
        weight = effective(0.99) if late and base == "ldam" else [1.0] * CLASSES
        share = [0.3 * CLASSES * n / TOTAL + 0.7 for n in COUNTS]
        temperature = [1.5 * s / max(share) if late else 1.5 for s in share]
        T = sum(temperature) / CLASSES
        mean = z.detach().mean(0)
        expected: Any = 0.0
        for e in range(EXPERTS):
            total: Any = 0.0
            divergence: Any = 0.0
            weights = 0.0
            for i, y in enumerate(Y.tolist()):
                shifted = [z[e, i, c] - (30 * margin[c] if c == y else 0) for c in range(CLASSES)]
                total, weights = total - weight[y] * log_softmax(shifted, y), weights + weight[y]
                p = [mean[i, c] / temperature[c] for c in range(CLASSES)]
                own = [z[e, i, c] / temperature[c] for c in range(CLASSES)]
                for c in range(CLASSES):
                    log_p = log_softmax(p, c)
                    divergence = divergence + log_p.exp() * (log_p - log_softmax(own, c)) / BATCH
            expected = expected + total / weights - 0.45 * T**2 * divergence
        ride = {"base": base, "diversity": 0.45, "temperature": 1.5, "reweight_epoch": 2, "reweight_factor": 0.3}
        output = loss_of("ride", epoch, ride=ride | {"beta": 0.99})(Anchors(Y, z))
        check(output.loss, expected, z)
        assert (output.parts["base"] - 0.45 * output.parts["diversity"]).item() == pytest.approx(output.loss.item())

    def test_refuses_a_model_without_experts(self):
        """Logits [B, C] would be one expert that differs from nobody."""
        with pytest.raises(ValueError, match="logits of experts"):
            loss_of("ride")(Anchors(Y, logits()))

    def test_refuses_a_factor_that_leaves_no_temperature(self):
        """A factor of 1 would give a class of a vanishing share none; the recipe keeps it below."""
        with pytest.raises(ValueError, match="reweight_factor"):
            RideSettings(reweight_factor=1.0)


class TestBalPoE:
    @pytest.mark.parametrize("lambdas", [(1.0, 0.0, -1.0), (0.5, 0.0, -2.0)])
    def test_each_expert_has_its_own_bias(self, lambdas):
        """The mean over experts of logit adjustment with 1 - lambda."""
        z = logits(EXPERTS)
        of_experts = []
        for e in range(EXPERTS):
            total: Any = 0.0
            for i, y in enumerate(Y.tolist()):
                tau = 1 - lambdas[e]
                adjusted = [z[e, i, c] + tau * math.log(COUNTS[c] / TOTAL) for c in range(CLASSES)]
                total = total - log_softmax(adjusted, y) / BATCH
            of_experts.append(total)
        output = loss_of("balpoe", balpoe={"lambdas": lambdas})(Anchors(Y, z))
        check(output.loss, sum(of_experts) / EXPERTS, z)
        assert [float(part) for part in output.parts.values()] == pytest.approx([float(t.detach()) for t in of_experts])

    @pytest.mark.parametrize("shape", [(BATCH, CLASSES), (2, BATCH, CLASSES)])
    def test_refuses_another_number_of_experts(self, shape):
        """Two for three lambdas, or a model without."""
        with pytest.raises(ValueError, match="3 experts"):
            loss_of("balpoe")(Anchors(Y, torch.zeros(shape)))


def supcon_terms(q, k, keys, queue_labels, temperature, bias=None, weight=None, log_q=None):
    """SupCon anchor by anchor, each divided by its number of positives."""
    total: Any = 0.0
    for i, y in enumerate(Y.tolist()):
        members = [(q[j], int(Y[j])) for j in range(BATCH) if j != i]
        members += list(zip(k, Y.tolist(), strict=True)) + list(zip(keys, queue_labels.tolist(), strict=True))
        s = [q[i] @ row / temperature + (0 if log_q is None else log_q[c]) for row, c in members]
        lse = sum(v.exp() for v in s).log()
        pulls = [v - lse for v, (_, c) in zip(s, members, strict=True) if c == y]
        total = total - (1 if weight is None else weight[y]) * sum(pulls) / len(pulls) / BATCH
    return total


class Views:
    """Queries, keys and a queue."""

    def __init__(self) -> None:
        self.q, self.k = rows(BATCH, DIM, seed=0).requires_grad_(), rows(BATCH, DIM, seed=1)
        self.keys, self.queue_labels = rows(20, DIM, seed=3), labels(20, 5)
        self.queue = QueueSnapshot.of(self.keys, self.queue_labels, CLASSES)


def test_supcon_is_contrast_alone():
    """Eq. (3); alpha, beta and gamma of the recipe play no part, and centers are not looked at."""
    v = Views()
    loss = loss_of("supcon", temperature=0.3, alpha=0.05, beta=2.0, gamma=0.5)
    expected = supcon_terms(v.q, v.k, v.keys, v.queue_labels, 0.3)
    check(loss(Anchors(Y, logits(), v.q, v.k, v.queue)).loss, expected, v.q)


@pytest.mark.parametrize("softmax", ["cross_entropy", "balanced_softmax"])
@pytest.mark.parametrize("contrast", ["reweighted", "balanced_softmax", "supcon"])
def test_multi_task_is_the_sum_that_its_row_names(softmax, contrast):
    """Tables 13, 14: the softmax term and a weighted SupCon, re-weighted or with log q on its logits."""
    v, z = Views(), logits()
    log_q = [math.log(n / TOTAL) for n in COUNTS]
    centers: Any = 0.0
    for i, y in enumerate(Y.tolist()):
        adjusted = [z[i, c] + (log_q[c] if softmax == "balanced_softmax" else 0) for c in range(CLASSES)]
        centers = centers - log_softmax(adjusted, y) / BATCH
    pairs = supcon_terms(
        v.q,
        v.k,
        v.keys,
        v.queue_labels,
        0.2,
        weight=effective(0.99) if contrast == "reweighted" else None,
        log_q=log_q if contrast == "balanced_softmax" else None,
    )
    own = {"softmax": softmax, "contrast": contrast, "weight": 0.35, "beta": 0.99}
    output = loss_of("multi_task", multi_task=own)(Anchors(Y, z, v.q, v.k, v.queue))
    check(output.loss, centers + 0.35 * pairs, v.q, z)
    assert float(output.parts["contrast"].detach()) == pytest.approx(float(pairs.detach()), rel=1e-6)


@pytest.mark.parametrize("rebalanced", [True, False])
def test_paco_with_and_without_center_rebalance(rebalanced):
    """Eq. (4), normalised as published; log q on the centers, or not, as for balanced data."""
    v, z, alpha = Views(), logits(), 0.05
    total: Any = 0.0
    for i, y in enumerate(Y.tolist()):
        members = [(v.q[j], int(Y[j])) for j in range(BATCH) if j != i]
        members += list(zip(v.k, Y.tolist(), strict=True)) + list(zip(v.keys, v.queue_labels.tolist(), strict=True))
        s = [v.q[i] @ row / 0.2 for row, _ in members]
        centers = [z[i, c] + (math.log(COUNTS[c] / TOTAL) if rebalanced else 0) for c in range(CLASSES)]
        log_denominator = sum(value.exp() for value in (*s, *centers)).log()
        positives = [score for score, (_, c) in zip(s, members, strict=True) if c == y]
        weighted = centers[y] - log_denominator + alpha * sum(score - log_denominator for score in positives)
        total = total - weighted / (1 + alpha * len(positives)) / BATCH
    check(loss_of("paco", class_prior=rebalanced)(Anchors(Y, z, v.q, v.k, v.queue)).loss, total, v.q, z)


class TestBcl:
    @pytest.mark.parametrize("with_keys", [False, True], ids=["as_published", "with_keys_and_queue"])
    def test_is_its_equation(self, with_keys):
        """Every class counts once in the denominator, as the mean of its members; prototypes are positives too."""
        v, z, prototypes = Views(), logits(), rows(CLASSES, DIM, seed=7).requires_grad_()
        pairs: Any = 0.0
        for i, y in enumerate(Y.tolist()):
            members = [(v.q[j], int(Y[j])) for j in range(BATCH) if j != i]
            if with_keys:
                members += list(zip(v.k, Y.tolist(), strict=True))
                members += list(zip(v.keys, v.queue_labels.tolist(), strict=True))
            members += [(prototypes[c], c) for c in range(CLASSES)]
            s = [(v.q[i] @ row / 0.2, c) for row, c in members]
            denominator: Any = 0.0
            for c in range(CLASSES):
                of_class = [score.exp() for score, k in s if k == c]
                denominator = denominator + sum(of_class) / len(of_class)
            positives = [score for score, k in s if k == y]
            pairs = pairs - sum(score - denominator.log() for score in positives) / len(positives) / BATCH
        centers: Any = 0.0
        for i, y in enumerate(Y.tolist()):
            centers = centers - log_softmax([z[i, c] + math.log(COUNTS[c] / TOTAL) for c in range(CLASSES)], y) / BATCH
        loss = loss_of("bcl", bcl={"softmax_weight": 2.0, "contrast_weight": 0.6})
        output = loss(Anchors(Y, z, v.q, v.k if with_keys else None, v.queue if with_keys else None, prototypes))
        check(output.loss, 2 * centers + 0.6 * pairs, v.q, z, prototypes)

    def test_is_the_mean_over_experts(self):
        """Rows of experts are heads."""
        q, prototypes = rows(EXPERTS, BATCH, DIM, seed=0), rows(EXPERTS, CLASSES, DIM, seed=7)
        keys = rows(20, EXPERTS * DIM, seed=3)
        queue = QueueSnapshot.of(keys, labels(20, 5), CLASSES)
        loss, z = loss_of("bcl"), logits(EXPERTS)
        single = []
        for e in range(EXPERTS):
            own = QueueSnapshot.of(keys[:, e * DIM : (e + 1) * DIM].contiguous(), labels(20, 5), CLASSES)
            single.append(loss(Anchors(Y, z[e], q[e], None, own, prototypes[e])).loss)
        ours = loss(Anchors(Y, z, q, None, queue.experts(EXPERTS), prototypes)).loss
        torch.testing.assert_close(ours, torch.stack(single).mean(), **CLOSE)

    def test_refuses_rows_that_do_not_fit(self):
        """Prototypes of another dimension or number of classes, no queries, a softmax term with contrast."""
        loss, z, q = loss_of("bcl"), logits(), rows(BATCH, DIM, seed=0)
        with pytest.raises(ValueError, match="same experts and dimension"):
            loss(Anchors(Y, z, q, None, None, rows(CLASSES, DIM + 1, seed=1)))
        with pytest.raises(ValueError, match="prototypes must have one row"):
            loss(Anchors(Y, z, q, None, None, rows(CLASSES + 1, DIM, seed=1)))
        with pytest.raises(ValueError, match="needs queries"):
            loss(Anchors(Y, z, None, None, None, rows(CLASSES, DIM, seed=1)))
        with pytest.raises(ValueError, match="contrast=False"):
            BalancedContrastiveLoss(ParametricContrastiveLoss(alpha=1, temperature=1), CLASSES, 0.1)


def log_bessel(order: float, x: float) -> float:
    """log I_v(x) by its power series, sum over m of (x / 2)^(2 m + v) / (m! Gamma(m + v + 1))."""
    logs = [
        (2 * m + order) * math.log(x / 2) - math.lgamma(m + 1) - math.lgamma(m + order + 1)
        for m in range(50 + 2 * int(x))
    ]
    top = max(logs)
    return top + math.log(math.fsum(math.exp(v - top) for v in logs))


def log_bessel_of(order: float, x: torch.Tensor) -> torch.Tensor:
    """The same, differentiable in x > 0."""
    m = torch.arange(50 + 2 * int(x), dtype=torch.float64)
    return ((2 * m + order) * (x / 2).log() - torch.lgamma(m + 1) - torch.lgamma(m + order + 1)).logsumexp(0)


class TestVonMisesFisher:
    @pytest.mark.parametrize("dim", [2, 3, 8, 32, 128, 1024])
    def test_log_normaliser_is_that_of_the_power_series(self, dim):
        """From concentrations near 0, where scipy underflows, to 300, with its derivative by the order above."""
        order = dim / 2 - 1
        k = torch.tensor([1e-3, 0.1, 1.0, 5.0, 14.3, 60.0, 300.0], dtype=torch.float64, requires_grad=True)
        value = log_normaliser(k, dim)
        expected = [log_bessel(order, x) - order * math.log(x) for x in k.tolist()]
        assert value.tolist() == pytest.approx(expected, rel=1e-10, abs=1e-10)
        (slope,) = torch.autograd.grad(value.sum(), k)
        ratios = [math.exp(log_bessel(order + 1, x) - log_bessel(order, x)) for x in k.tolist()]
        assert slope.tolist() == pytest.approx(ratios, rel=1e-9)

    def test_three_dimensions_have_a_closed_form(self):
        """I_{1/2}(k) = sqrt(2 / (pi k)) sinh k, also for a concentration of 1e5."""
        k = torch.tensor([0.5, 20.0, 1e5], dtype=torch.float64)
        expected = 0.5 * math.log(2 / math.pi) + k + torch.log1p(-(-2 * k).exp()) - math.log(2) - k.log()
        torch.testing.assert_close(log_normaliser(k, 3), expected, rtol=1e-12, atol=1e-10)

    def test_zero_is_the_limit(self):
        """A uniform distribution, with a slope of 0."""
        k = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        value = log_normaliser(k, 8)
        assert value.item() == pytest.approx(-3 * math.log(2) - math.lgamma(4))
        assert torch.autograd.grad(value, k)[0].item() == pytest.approx(0, abs=1e-12)
        with pytest.raises(ValueError, match="at least 2 dimensions"):
            log_normaliser(k, 1)


class TestProCo:
    def test_is_its_equation(self):
        """Class by class from the queue: a class without keys is uniform, one with a single key is at the limit; the
        softmax term is logit-adjusted."""
        v, z = Views(), logits()
        queue_labels = torch.tensor([0] * 10 + [1] * 6 + [2] * 3 + [4])
        queue = QueueSnapshot.of(v.keys, queue_labels, CLASSES)
        order, tau = DIM / 2 - 1, 0.2
        concentration, direction, own_g = [], [], []
        for c in range(CLASSES):
            own = [row for row, k in zip(v.keys, queue_labels.tolist(), strict=True) if k == c]
            mean = sum(own) / len(own) if own else torch.zeros(DIM, dtype=torch.float64)
            R = float(mean.norm())
            k = 100.0 if len(own) == 1 else min(100.0, DIM * R / (1 - R * R))
            concentration.append(k)
            direction.append(mean / R if own else mean)
            own_g.append(log_bessel(order, k or 1e-9) - order * math.log(k or 1e-9))
        assert concentration[3] == 0
        prior = [math.log(count / TOTAL) for count in COUNTS]
        contrast: Any = 0.0
        centers: Any = 0.0
        for i, y in enumerate(Y.tolist()):
            s = []
            for c in range(CLASSES):
                joint = (concentration[c] * direction[c] + v.q[i] / tau).norm()
                s.append(log_bessel_of(order, joint) - order * joint.log() - own_g[c] + prior[c])
            contrast = contrast - log_softmax(s, y) / BATCH
            centers = centers - log_softmax([z[i, c] + prior[c] for c in range(CLASSES)], y) / BATCH
        output = loss_of("proco", proco={"max_concentration": 100.0, "weight": 0.5})(Anchors(Y, z, v.q, None, queue))
        torch.testing.assert_close(output.parts["contrast"], contrast.detach(), **CLOSE)
        torch.testing.assert_close(output.parts["softmax"], centers.detach(), **CLOSE)
        check(output.loss, centers + 0.5 * contrast, v.q, z)

    def test_is_the_mean_over_experts(self):
        """Each with its own part of the queue."""
        q, keys, z = rows(EXPERTS, BATCH, DIM, seed=0), rows(20, EXPERTS * DIM, seed=3), logits(EXPERTS)
        queue, loss = QueueSnapshot.of(keys, labels(20, 5), CLASSES), loss_of("proco")
        single = []
        for e in range(EXPERTS):
            own = QueueSnapshot.of(keys[:, e * DIM : (e + 1) * DIM].contiguous(), labels(20, 5), CLASSES)
            single.append(loss(Anchors(Y, z[e], q[e], None, own)).loss)
        torch.testing.assert_close(
            loss(Anchors(Y, z, q, None, queue.experts(EXPERTS))).loss, torch.stack(single).mean()
        )

    def test_an_empty_queue_says_nothing(self):
        """Every class is uniform: the contrast is the prior's, and moves no query."""
        v = Views()
        queue = QueueSnapshot.of(v.keys[:0], v.queue_labels[:0], CLASSES)
        output = loss_of("proco")(Anchors(Y, logits(), v.q, None, queue))
        expected = -sum(math.log(COUNTS[y] / TOTAL) for y in Y.tolist()) / BATCH
        assert output.parts["contrast"].item() == pytest.approx(expected, rel=1e-6)
        (grad,) = torch.autograd.grad(output.loss, v.q)
        assert grad.abs().max() < 1e-6

    def test_refuses_what_does_not_fit(self):
        """No queue, a queue of another dimension, a softmax term with contrast."""
        v, loss = Views(), loss_of("proco")
        with pytest.raises(ValueError, match="needs queries, and a queue"):
            loss(Anchors(Y, logits(), v.q, None, None))
        with pytest.raises(ValueError, match="do not fit the queue"):
            loss(Anchors(Y, logits(), rows(BATCH, DIM + 1, seed=0), None, v.queue))
        with pytest.raises(ValueError, match="contrast=False"):
            ProCoLoss(ParametricContrastiveLoss(alpha=1, temperature=1), torch.zeros(CLASSES), 0.1)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_gradcheck(method):
    """The gradient of every method is that of its value, by finite differences."""
    experts = EXPERTS if method in OF_EXPERTS else None
    # no gradient flows into the mean of RIDE's experts and into MDCS's teacher, which its value depends on
    sections = {"ride": {"diversity": 0.0, "reweight_epoch": 0}, "mdcs": {"weight": 0.0}}
    loss, v = loss_of(method, epoch=5, **sections, ldam={"drw_epoch": 1}), Views()
    more = further(method)
    inputs = [logits(experts), v.q, *(tensor.requires_grad_() for tensor in more.values())]

    def value(z, q, *others):
        return loss(Anchors(Y, z, q, v.k, v.queue, **dict(zip(more, others, strict=True)))).loss

    assert torch.autograd.gradcheck(value, inputs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_is_float32_under_autocast(method):
    """bfloat16 logits and rows give a float32 loss, as near as their own rounding."""
    experts, more = EXPERTS if method in OF_EXPERTS else None, further(method)
    loss, v = loss_of(method), Views()
    whole = loss(Anchors(Y, logits(experts), v.q, v.k, v.queue, **more)).loss
    queue = QueueSnapshot.of(v.keys.float(), v.queue_labels, CLASSES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        single = {name: tensor.float() for name, tensor in more.items()}
        half = loss(Anchors(Y, logits(experts).bfloat16(), v.q.float(), v.k.float(), queue, **single)).loss
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(whole.item(), rel=0.02)


@pytest.mark.parametrize("method", ["bcl", "mdcs", "multi_task", "proco", "ride", "routing", "sade", "supcon"])
def test_can_be_planned_on_fake_tensors(method):
    """No method looks at numbers where the planner has none, and its parts are counted."""
    experts = ("model.experts=3", "model.centers=cosine") if method in OF_EXPERTS else ()
    if method == "routing":
        experts = (*experts, "model.trained=routers", "model.start_from=unused")
    trace = trace_step(tiny_recipe(f"loss.method={method}", *experts), tuple(COUNTS), autocast=False)
    assert trace.loss_parts == {"supcon": 0, "sade": 3}.get(method, 2)
    assert trace.peak > 0


WITHOUT_COUNTS = ["cross_entropy", "focal", "routing", "supcon"]
NEED_COUNTS = sorted(set(METHODS) - set(WITHOUT_COUNTS))


ROUTERS = ("model.trained=routers", "model.start_from=unused")


class TestBadInput:
    @pytest.mark.parametrize("method", NEED_COUNTS)
    def test_a_class_without_images_is_named(self, method):
        """With its number and name."""
        with pytest.raises(DataError, match=r"no training images for 1 of 3 classes: 1 \(owl\)"):
            make_loss(LossSettings(method=method), [5, 0, 1], ["hen", "owl", "auk"])

    def test_focal_needs_counts_for_weights_only(self):
        """And says which setting to change."""
        settings = tiny_recipe("loss.method=focal", "loss.focal.class_balanced=true").loss
        with pytest.raises(DataError, match=r"set loss\.focal\.class_balanced=false"):
            make_loss(settings, [5, 0, 1])

    @pytest.mark.parametrize("method", WITHOUT_COUNTS)
    def test_methods_without_weights_take_empty_classes(self, method):
        """Counts play no part."""
        make_loss(LossSettings(method=method), [5, 0, 1])

    @pytest.mark.parametrize("counts", [None, []])
    def test_no_counts_at_all(self, counts):
        """What to build, not a traceback."""
        with pytest.raises(RecipeError, match=r"ldam needs the training images of every class.*manifest"):
            make_loss(LossSettings(method="ldam"), counts)

    @pytest.mark.parametrize("method", ["focal", "ldam", "ride", "balpoe", "sade", "mdcs"])
    def test_logits_of_another_number_of_classes(self, method):
        """Named with both numbers."""
        shape = (EXPERTS, BATCH, 4) if method in OF_EXPERTS else (BATCH, 4)
        with pytest.raises(ValueError, match="4 center logits, but 5 classes"):
            loss_of(method)(Anchors(Y, torch.zeros(shape)))

    @pytest.mark.parametrize("method", ["focal", "ldam", *OF_EXPERTS])
    def test_no_logits_or_no_images(self, method):
        """Neither is a loss of nothing."""
        with pytest.raises(ValueError, match="needs center logits"):
            loss_of(method)(Anchors(Y, None))
        experts = (EXPERTS,) if method in OF_EXPERTS else ()
        with pytest.raises(ValueError, match="without images"):
            loss_of(method)(Anchors(Y[:0], torch.zeros(*experts, 0, CLASSES)))

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: FocalLoss(-1.0, CLASSES), "gamma"),
            (lambda: FocalLoss(1.0, CLASSES, torch.ones(3)), "one finite number"),
            (lambda: LdamLoss([3, 0]), "an image of each class"),
            (lambda: LdamLoss(COUNTS, max_margin=-1.0), "max_margin"),
            (lambda: LdamLoss(COUNTS, scale=0.0), "positive scale"),
            (lambda: BalPoELoss(torch.zeros(3), ()), "a lambda for each expert"),
        ],
    )
    def test_settings_out_of_range(self, make, message):
        """In a loop of one's own, where no recipe was checked."""
        with pytest.raises(ValueError, match=message):
            make()

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["loss.method=ldam"], "set model.centers to cosine"),
            (
                ["loss.method=ldam", "model.centers=cosine", "model.centers_scale=16"],
                "scale 30 and .*16 are one number",
            ),
            (["loss.method=ride", "model.experts=3"], "cosine or loss.ride.base to cross_entropy"),
            (["loss.method=ride", "loss.ride.base=cross_entropy"], "model.experts is null"),
            (["loss.method=balpoe"], "model.experts is null"),
            (["loss.method=balpoe", "model.experts=2"], "3 numbers for 2 experts"),
            (["loss.method=routing", "model.experts=3"], "belong together.* model.trained all and loss.method routing"),
            (
                ["loss.method=ride", *ROUTERS, "model.experts=3", "model.centers=cosine"],
                "belong together.* model.trained routers and loss.method ride",
            ),
            (["loss.method=routing", "model.experts=3", "model.trained=routers"], "set start_from"),
            (["loss.method=routing", *ROUTERS], "model.experts is null: set it to that of the first stage"),
            (["loss.method=routing", *ROUTERS, "model.experts=1"], "model.experts is 1.* must have 2 at least"),
            (["loss.method=routing", *ROUTERS, "model.experts=2", "step.mixup=0.4"], "set step.mixup to 0"),
            (["loss.method=supcon", "loss.distill={teacher: x}"], "supcon does not train: set distill to null"),
            (["loss.method=routing", *ROUTERS, "model.experts=2", "loss.distill={teacher: x}"], "set distill to null"),
            (["loss.distill={weight: 2}"], "'loss.distill.teacher' is missing"),
            (["loss.method=proco", "queue.length=0"], "set queue.length above 0"),
            (["loss.method=paco", "step.mixup=0.4"], "set step.mixup to 0"),
            (["loss.method=paco", "step.cutmix=1"], "set step.cutmix to 0"),
            (["loss.method=balanced_softmax", "step.cutmix=1", "step.mixup=1"], "set one of them to 0"),
            (
                ["loss.method=ldam", "model.centers=cosine", "loss.ldam.drw_epoch=2"],
                "drw_epoch 2 is never reached in 2 epochs",
            ),
            (
                ["loss.method=focal", "loss.smoothing=0.1"],
                "smoothing 0.1 is not part of .* focal; set it to 0",
            ),
            (["loss.method=focal", "loss.focal.gama=1"], "nearest valid name: 'loss.focal.gamma'"),
        ],
    )
    def test_recipes_that_do_not_fit_their_method(self, overrides, message):
        """The setting to change is named."""
        with pytest.raises(RecipeError, match=message):
            tiny_recipe(*overrides)

    def test_settings_of_other_methods_do_not_matter(self):
        """So that --set loss.method=... is enough on any recipe."""
        tiny_recipe("loss.method=cross_entropy", "loss.ldam.drw_epoch=90", "loss.ride.reweight_epoch=90")

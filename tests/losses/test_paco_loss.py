"""The general form of the loss against Eq. (4) term by term, the paper's closed forms and torch's losses."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from paco_ds.contrast.key_queue import KeyQueue, QueueSnapshot
from paco_ds.losses.base import Anchors
from paco_ds.losses.paco import ParametricContrastiveLoss, class_prior
from tests.losses.reference import parametric_contrastive_loss
from tests.paper import closed_forms as theory

DIM = 8
SUPCON: dict[str, Any] = {"centers": False, "beta": 0.0, "alpha": 1.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "paco": {},
    "summed": {"normalization": "summed"},
    "gamma_0": {"gamma": 0.0},
    "gamma_.3_summed": {"gamma": 0.3, "normalization": "summed"},
    "beta": {"beta": 0.5},
    "no_beta": {"beta": 0.0},
    "prior_supt": {"log_prior_C": True, "supt": 1.3},
    "smoothing": {"smoothing": 0.1},
    "everything": {"gamma": 0.3, "beta": 0.7, "supt": 0.8, "smoothing": 0.2, "log_prior_C": True},
    "supcon": SUPCON,
    "supcon_summed": SUPCON | {"normalization": "summed"},
    "softmax": {"contrast": False, "log_prior_C": True},
    "bias": {"contrast_bias_C": True},
    "weights": {"class_weight_C": True, "normalization": "summed"},
    "supcon_bias_weights": SUPCON | {"contrast_bias_C": True, "class_weight_C": True},
}
BY_CLASS = {"log_prior_C": "log_prior", "contrast_bias_C": "contrast_bias", "class_weight_C": "class_weight"}


@dataclass
class Case:
    """One micro-batch in float64 and the queue it meets."""

    labels: torch.Tensor
    logits: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor | None
    queue: QueueSnapshot

    def ours(self, **settings):
        settings = {"alpha": 0.05, "temperature": 0.2} | settings
        loss = ParametricContrastiveLoss(**settings)
        return loss(Anchors(self.labels, self.logits, self.query, self.key, self.queue))

    def reference(self, **settings):
        settings = {"alpha": 0.05, "temperature": 0.2} | {BY_CLASS.get(k, k): v for k, v in settings.items()}
        queue_keys, queue_labels = self.queue.keys_ND.double(), self.queue.labels_N
        return parametric_contrastive_loss(
            self.labels, self.logits, self.query, self.key, queue_keys, queue_labels, **settings
        )


def make_case(batch=6, classes=4, queue=20, seed=0, scale=1.0) -> Case:
    """Random unit rows and labels; `queue` keys pushed to 50 slots, their class sums in float64."""
    generator = torch.Generator().manual_seed(seed)

    def unit(rows):
        return F.normalize(torch.randn(rows, DIM, dtype=torch.float64, generator=generator), dim=1)

    def labels(rows):
        return torch.randint(classes, (rows,), generator=generator)

    ring = KeyQueue(50, DIM)
    ring.push(unit(queue).float(), labels(queue))
    logits = scale * torch.randn(batch, classes, dtype=torch.float64, generator=generator)
    held = ring.snapshot(classes)
    snapshot = QueueSnapshot.of(held.keys_ND.double(), held.labels_N, classes)
    return Case(labels(batch), logits.requires_grad_(), unit(batch).requires_grad_(), unit(batch), snapshot)


def prior(classes: int) -> torch.Tensor:
    return class_prior(torch.arange(1, classes + 1) ** 2)


def with_class_values(classes: int, **settings):
    """Settings with a tensor for each that has a number per class."""
    return settings | {k: prior(classes) * (-1) ** (k == "class_weight_C") for k in BY_CLASS if k in settings}


def assert_equals_reference(case: Case, **settings) -> None:
    """Loss and the gradients of queries and logits."""
    settings = with_class_values(case.logits.shape[1], **settings)
    ours, expected = case.ours(**settings).loss, case.reference(**settings)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)
    inputs = [case.query] * settings.get("contrast", True) + [case.logits] * settings.get("centers", True)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(expected, inputs), rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize("queue", [0, 1, 20, 70], ids=["empty", "one_key", "partly_filled", "full"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_equals_the_transcription(settings, queue):
    """Every setting, with a queue in each state."""
    assert_equals_reference(make_case(queue=queue, seed=queue), **settings)


@pytest.mark.parametrize("settings", [SETTINGS["paco"], SETTINGS["summed"], SETTINGS["supcon"]])
@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("keyless", [False, True], ids=["keys", "no_keys"])
def test_small_and_keyless_batches(settings, batch, keyless):
    """One image alone, and batches whose anchors may lack any positive."""
    case = make_case(batch=batch, queue=7, classes=9, seed=3)
    case.key = None if keyless else case.key
    assert_equals_reference(case, **settings)


PACO = {"log_prior_C": True, "smoothing": 0.1, "gamma": 0.7}
INPUTS = ("logits", "query", "key")


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [(PACO, some) for some in (["logits"], ["query"], ["key"], ["query", "key"], INPUTS)]
    + [(SUPCON, some) for some in (["query"], ["key"], ["query", "key"])],
)
@pytest.mark.parametrize("experts", [1, 3])
def test_each_gradient_by_itself_and_twice(settings, wanted, experts):
    """Of inputs that want one, those of the transcription; a second backward through the same graph is the first."""
    settings = with_class_values(4, **settings)
    cases = [make_case(seed=seed) for seed in range(experts)]
    for case in cases:
        case.labels, case.queue = cases[0].labels, cases[0].queue
        for name in INPUTS:
            getattr(case, name).requires_grad_(name in wanted)
    inputs = [torch.stack([getattr(case, name) for case in cases]).detach() for name in INPUTS]
    for tensor, name in zip(inputs, INPUTS, strict=True):
        tensor.requires_grad_(name in wanted)
    held = cases[0].queue
    queue = QueueSnapshot.of(held.keys_ND.repeat(1, experts), held.labels_N, 4).experts(experts)
    loss = ParametricContrastiveLoss(**{"alpha": 0.05, "temperature": 0.2} | settings)
    logits, query, key = inputs
    ours = loss(Anchors(cases[0].labels, logits, query, key, queue)).loss
    asked = [tensor for tensor in inputs if tensor.requires_grad]
    first = torch.autograd.grad(ours, asked, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(ours, asked)))
    for expert, case in enumerate(cases):
        expected = torch.autograd.grad(case.reference(**settings) / experts, [getattr(case, name) for name in wanted])
        torch.testing.assert_close(tuple(g[expert] for g in first), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("normalization", ["published", "summed"])
class TestAwkwardCases:
    def test_no_positive_in_the_queue(self, normalization):
        """Class sums of absent classes are zero, not garbage."""
        case = make_case()
        case.labels = torch.zeros_like(case.labels)
        others = case.queue.labels_N.clamp_min(1)
        case.queue = QueueSnapshot.of(case.queue.keys_ND, others, 4)
        assert_equals_reference(case, normalization=normalization)

    def test_one_class(self, normalization):
        """Everything in A(i) is a positive and the only center the right one."""
        assert_equals_reference(make_case(classes=1), normalization=normalization)

    def test_logits_of_ten_thousand(self, normalization):
        """Center logits and contrast logits of 1e4 neither overflow nor lose the gradient."""
        case = make_case(scale=1e4)
        assert_equals_reference(case, normalization=normalization, temperature=1e-4)

    def test_float32_logits_of_ten_thousand_stay_finite(self, normalization):
        """The precision that training uses."""
        case = make_case(scale=1e4)
        case.logits, case.query, case.key = (t.detach().float() for t in (case.logits, case.query, case.key))
        case.query.requires_grad_()
        loss = case.ours(normalization=normalization, temperature=1e-4).loss
        assert loss.isfinite()
        assert torch.autograd.grad(loss, case.query)[0].isfinite().all()

    def test_transposed_query(self, normalization):
        """A query stored column by column counts as its rows."""
        case = make_case()
        case.query = case.query.detach().T.contiguous().T.requires_grad_()
        assert case.query.stride(1) != 1
        assert_equals_reference(case, normalization=normalization)

    def test_gradcheck_with_the_other_queries_as_contrasts(self, normalization):
        """Numerical derivatives in queries, logits, and keys that carry a gradient (as in GPaCo)."""
        case = make_case(batch=3, queue=6)
        values = with_class_values(4, log_prior_C=True, contrast_bias_C=True, class_weight_C=True)
        settings = {"smoothing": 0.1, "gamma": 0.7, "supt": 1.2, "normalization": normalization}
        loss = ParametricContrastiveLoss(alpha=0.3, temperature=0.5, **settings, **values)
        assert case.key is not None
        case.key.requires_grad_()

        def of(query, logits, key):
            return loss(Anchors(case.labels, logits, query, key, case.queue)).loss * 1.5

        assert torch.autograd.gradcheck(of, (case.query, case.logits, case.key))


def test_detaching_the_other_queries_would_be_seen():
    """Negative control: without the gradient of queries as contrasts dL/dq differs by percents."""
    case = make_case()
    (ours,) = torch.autograd.grad(case.ours().loss, case.query)
    detached = case.reference(other_queries=case.query.detach())
    (wrong,) = torch.autograd.grad(detached, case.query)
    assert (ours - wrong).norm() > 0.02 * ours.norm()


def test_anchors_without_positives_contribute_nothing_to_supcon():
    """SupCon's convention: their loss and gradient are 0, but they count in the mean."""
    case = make_case(batch=3, classes=9, queue=0)
    case.labels, case.key = torch.tensor([2, 2, 5]), None
    output = case.ours(**SETTINGS["supcon"])
    scores = (case.query @ case.query.T / 0.2).fill_diagonal_(float("-inf"))
    torch.testing.assert_close(output.loss, -(scores.log_softmax(1)[0, 1] + scores.log_softmax(1)[1, 0]) / 3)
    assert output.positive_probability_B.isnan().tolist() == [False, False, True]
    assert torch.autograd.grad(output.loss, case.query)[0].isfinite().all()


class TestOptimum:
    """Minimised numerically: with an orthonormal queue the anchor's contrast logits are free."""

    def minimise(self, positives=6, negatives=3, **settings):
        """The output at the minimum for one anchor of class 0 whose own key is one of its positives."""
        rows = positives + negatives
        keys = torch.eye(rows, dtype=torch.float64)
        labels = torch.tensor([0] * positives + [1] * negatives)
        queue = QueueSnapshot.of(keys[1:], labels[1:], num_classes=4)
        query = torch.zeros(1, rows, dtype=torch.float64, requires_grad=True)
        logits = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
        loss = ParametricContrastiveLoss(temperature=0.5, **settings)
        optimiser = torch.optim.LBFGS(
            [query, logits],
            max_iter=200,
            tolerance_grad=1e-7,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )

        def closure():
            optimiser.zero_grad()
            value = loss(Anchors(labels[:1], logits, query, keys[:1], queue)).loss
            value.backward()
            return value

        optimiser.step(closure)
        output = loss(Anchors(labels[:1], logits, query, keys[:1], queue))
        return output, query.detach()[0] / 0.5

    @pytest.mark.parametrize("normalization", ["published", "summed"])
    @pytest.mark.parametrize("alpha", [0.05, 0.4])
    def test_paco_reaches_remark_2(self, alpha, normalization):
        """p+ = alpha / (1 + alpha K) for each positive, p_c = 1 / (1 + alpha K); the minimum is Eq. (17)."""
        output, s = self.minimise(alpha=alpha, normalization=normalization)
        p_positive, p_center = theory.paco_optimum(6, alpha)
        assert output.center_probability_B.item() == pytest.approx(p_center, abs=1e-5)
        assert output.positive_probability_B.item() == pytest.approx(p_positive, abs=1e-5)
        torch.testing.assert_close(s[:6], s[:1].expand(6), rtol=0, atol=1e-4)
        weight = 1 if normalization == "summed" else 1 + alpha * 6
        assert output.loss.item() == pytest.approx(theory.paco_minimum(6, alpha) / weight, abs=1e-5)

    def test_supcon_reaches_remark_1(self):
        """p+ = 1 / K; the minimum is Eq. (12)."""
        output, _ = self.minimise(**SETTINGS["supcon_summed"])
        assert output.positive_probability_B.item() == pytest.approx(theory.supcon_optimum(6), abs=1e-5)
        assert output.loss.item() == pytest.approx(theory.supcon_minimum(6), abs=1e-5)

    @pytest.mark.parametrize("settings", [{}, {"beta": 0.5}, {"gamma": 0.3}, {"smoothing": 0.1}])
    def test_reported_optima_are_reached(self, settings):
        """The optima of the output are exact for the batch at hand, whatever the setting."""
        output, _ = self.minimise(alpha=0.4, **settings)
        torch.testing.assert_close(output.center_probability_B, output.center_optimum_B, rtol=0, atol=1e-5)
        torch.testing.assert_close(output.positive_probability_B, output.positive_optimum_B, rtol=0, atol=1e-5)


def test_center_gradient_is_equation_18():
    """dL/dc_k = ((alpha K* + 1) p_ck - [y = k]) x in the summed form, for the own class and every other."""
    case, alpha = make_case(batch=1), 0.05
    feature = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    centers = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    case.logits = (centers @ feature)[None]
    output = case.ours(alpha=alpha, normalization="summed")
    (gradient,) = torch.autograd.grad(output.loss, centers)
    label = int(case.labels)
    probability = output.center_probability_B * (case.logits[0] - case.logits[0, label]).exp().detach()
    positives = 1 + int(case.queue.class_count_C[label])
    for k in range(4):
        scale = theory.center_gradient_scale(float(probability[k]), alpha, positives, own=k == label)
        torch.testing.assert_close(gradient[k], scale * feature, rtol=1e-10, atol=1e-12)


def test_probabilities_are_read_off_the_denominator():
    """p_c and the geometric mean of p+ equal a softmax over everything; optima are beta / W and alpha / W."""
    case = make_case()
    assert case.key is not None
    output = case.ours(beta=0.5)
    contrasts = torch.cat([case.query, case.key, case.queue.keys_ND.double()])
    labels = torch.cat([case.labels, case.labels, case.queue.labels_N])
    for i in range(6):
        kept = torch.arange(len(contrasts)) != i
        p = torch.cat([case.logits[i], case.query[i] @ contrasts[kept].T / 0.2]).softmax(0)
        positive = labels[kept] == case.labels[i]
        weight = 0.5 + 0.05 * int(positive.sum())
        assert output.center_probability_B[i].item() == pytest.approx(p[case.labels[i]].item())
        assert output.positive_probability_B[i].item() == pytest.approx(p[4:][positive].log().mean().exp().item())
        assert output.center_optimum_B[i].item() == pytest.approx(0.5 / weight)
        assert output.positive_optimum_B[i].item() == pytest.approx(0.05 / weight)
    assert not output.center_probability_B.requires_grad
    assert not output.positive_probability_B.requires_grad


def in_float32(case: Case) -> Case:
    logits, query = (t.detach().float().requires_grad_() for t in (case.logits, case.query))
    return Case(case.labels, logits, query, case.key.float(), case.queue)


@pytest.mark.parametrize("settings", [SETTINGS["paco"], SETTINGS["summed"], SETTINGS["supcon"]])
def test_float32_agrees_with_float64(settings):
    """Loss and gradients to 1e-5."""
    exact = make_case()
    single = in_float32(exact)
    losses = exact.ours(**settings).loss, single.ours(**settings).loss
    assert losses[1].dtype == torch.float32
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    gradients = [torch.autograd.grad(loss, c.query)[0] for loss, c in zip(losses, (exact, single), strict=True)]
    torch.testing.assert_close(gradients[1].double(), gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_autocast_changes_nothing(settings):
    """Under bfloat16 autocast the loss is float32 and bit-equal, gradients too."""
    settings = with_class_values(4, **settings)
    case = in_float32(make_case())
    plain = case.ours(**settings).loss
    with torch.autocast("cpu", torch.bfloat16):
        cast = case.ours(**settings).loss
    assert cast.dtype == torch.float32
    assert torch.equal(cast, plain)
    gradients = [torch.autograd.grad(loss, (case.query, case.logits), allow_unused=True) for loss in (plain, cast)]
    for a, b in zip(*gradients, strict=True):
        assert a is b is None or torch.equal(a, b)


def test_half_inputs_are_computed_in_float32():
    """What autocast hands over in bfloat16 is widened before anything is computed."""
    case = in_float32(make_case())
    case.logits, case.query, case.key = (t.detach().bfloat16() for t in (case.logits, case.query, case.key))
    half = case.ours().loss
    case.logits, case.query, case.key = case.logits.float(), case.query.float(), case.key.float()
    assert half.dtype == torch.float32
    assert torch.equal(half, case.ours().loss)


class TestSoftmaxSettings:
    def test_cross_entropy(self):
        """Without contrast and prior it is F.cross_entropy, and nothing else is needed."""
        case = make_case()
        loss = ParametricContrastiveLoss(alpha=0, temperature=1, contrast=False)
        output = loss(Anchors(case.labels, case.logits))
        torch.testing.assert_close(output.loss, F.cross_entropy(case.logits, case.labels))
        assert output.positive_probability_B is output.positive_optimum_B is None

    def test_smoothed_cross_entropy(self):
        """torch spreads its smoothing over all C classes, ours over the C - 1 others."""
        case = make_case()
        loss = ParametricContrastiveLoss(alpha=0, temperature=1, contrast=False, smoothing=0.1)
        expected = F.cross_entropy(case.logits, case.labels, label_smoothing=0.1 * 4 / 3)
        torch.testing.assert_close(loss(Anchors(case.labels, case.logits)).loss, expected)

    def test_balanced_softmax(self):
        """Without contrast, with prior, it is cross-entropy of logits + log counts."""
        case, counts = make_case(), torch.tensor([1000, 100, 10, 1])
        loss = ParametricContrastiveLoss(alpha=0, temperature=1, contrast=False, log_prior_C=class_prior(counts))
        expected = F.cross_entropy(case.logits + counts.log(), case.labels)
        torch.testing.assert_close(loss(Anchors(case.labels, case.logits)).loss, expected, rtol=1e-6, atol=1e-6)


class TestClassPrior:
    def test_is_the_log_share_of_each_class(self):
        """log q(y), float32, of a list or a tensor."""
        torch.testing.assert_close(class_prior([3, 1]), torch.tensor([0.75, 0.25]).log())
        assert torch.equal(class_prior([3, 1]), class_prior(torch.tensor([3, 1])))

    def test_moves_with_the_module_but_is_not_saved(self):
        """It is derived from the manifest: a buffer, not part of a checkpoint."""
        loss = ParametricContrastiveLoss(alpha=0.05, temperature=0.2, log_prior_C=class_prior([3, 1]))
        assert dict(loss.named_buffers()).keys() == {"log_prior_C"}
        assert loss.state_dict() == {}

    def test_refuses_a_class_without_images(self):
        """The message names the classes."""
        with pytest.raises(ValueError, match=r"2 of 4 classes: 1 \(lynx\), 3 \(moth\)\."):
            class_prior([5, 0, 2, 0], ["hare", "lynx", "mole", "moth"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"smoothing": 1.0}, "smoothing=1.0"),
        ({"normalization": "mean"}, "'published' or 'summed', got 'mean'"),
        ({"centers": False}, "needs contrast=True, beta=0"),
        ({"contrast_bias_C": torch.tensor([0.0, -torch.inf])}, "contrast_bias_C holds one finite number per class"),
        ({"centers": False, "contrast": False, "beta": 0.0}, "needs contrast=True, beta=0"),
    ],
)
def test_refused_settings(settings, message):
    """Settings out of range or without a term name themselves."""
    with pytest.raises(ValueError, match=message):
        make_case().ours(**settings)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({"query": None}, {}, "needs queries"),
        ({"logits": None}, {}, "needs center logits"),
        (
            {"key": torch.zeros(5, DIM)},
            {},
            r"keys must have one row for each of 6 labels, got shape \(5, 8\)",
        ),
        ({}, {"log_prior_C": torch.zeros(3)}, "4 center logits, but 3 classes in log_prior_C"),
        ({"query": torch.zeros(6, DIM + 1)}, {}, "queries and keys need the same shape"),
        ({"query": torch.zeros(6, DIM + 1), "key": None}, {}, "queue and queries need the same experts and dimension"),
        ({"query": torch.zeros(2, 6, DIM), "key": None}, {}, "the same number of experts"),
        ({"labels": torch.zeros(0, dtype=torch.int64)}, {}, "without images"),
    ],
)
def test_refused_inputs(change, settings, message):
    """Missing and misshapen inputs are named."""
    case = make_case()
    for name, value in change.items():
        setattr(case, name, value)
    with pytest.raises(ValueError, match=message):
        case.ours(**settings)


def test_refuses_an_image_with_nothing_to_contrast():
    """One image, no key, an empty queue and no centers leave an empty denominator."""
    case = make_case(batch=1, queue=0)
    case.key = None
    with pytest.raises(ValueError, match="nothing to contrast"):
        case.ours(**SETTINGS["supcon"])


def test_refuses_smoothing_over_one_class():
    """There is no other class to give the weight to."""
    with pytest.raises(ValueError, match="one class"):
        make_case(classes=1).ours(smoothing=0.1)


@pytest.mark.parametrize("name", ["logits", "query", "key"])
def test_what_is_not_finite_reaches_the_loss(name):
    """The guard of the optimizer step sees the loss only."""
    case = make_case()
    with torch.no_grad():
        getattr(case, name)[2, 1] = float("nan")
    assert not case.ours().loss.isfinite()


def test_refuses_a_queue_that_was_pushed_to_since():
    """Keys and class sums would be of two different queues."""
    case, ring = make_case(), KeyQueue(50, DIM)
    ring.push(torch.randn(5, DIM), torch.zeros(5, dtype=torch.int64))
    case.queue = ring.snapshot(4)
    assert case.ours().loss.isfinite()
    ring.push(torch.randn(1, DIM), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="take a new one after each push"):
        case.ours()

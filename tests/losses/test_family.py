"""Members of the family that are more than settings: GPaCo, experts, and sums of two losses."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from paco_ds.contrast.key_queue import KeyQueue, QueueSnapshot
from paco_ds.losses.base import Anchors, effective_number_weights
from paco_ds.losses.multitask import MultiTaskLoss
from paco_ds.losses.paco import ParametricContrastiveLoss, class_prior
from tests.losses.reference import parametric_contrastive_loss

CLASSES, DIM, COUNTS = 5, 8, [50, 20, 9, 3, 1]
PACO: dict[str, Any] = {"alpha": 0.05, "temperature": 0.2}
SUPCON: dict[str, Any] = {"alpha": 1.0, "beta": 0.0, "temperature": 0.2, "centers": False}
CLOSE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


def unit(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=generator), dim=-1)


def labels(rows: int, seed: int) -> torch.Tensor:
    return torch.randint(CLASSES, (rows,), generator=torch.Generator().manual_seed(seed))


def reference(labels_B, logits, query, key, queue_keys, queue_labels, **settings):
    names = {"log_prior_C": "log_prior", "contrast_bias_C": "contrast_bias", "class_weight_C": "class_weight"}
    settings = {names.get(name, name): value for name, value in settings.items()}
    return parametric_contrastive_loss(labels_B, logits, query, key, queue_keys, queue_labels, **settings)


def test_gpaco_has_both_views_as_anchors():
    """[q; k] with gradient as anchors and contrasts, the queue without: the sum over 2 B anchors, written out."""
    q, k, keys = (unit(rows, DIM, seed=seed) for rows, seed in ((4, 0), (4, 1), (20, 2)))
    q, k = q.requires_grad_(), k.requires_grad_()
    logits = (3 * unit(8, CLASSES, seed=3)).requires_grad_()
    one_view, queue_labels = labels(4, 4), labels(20, 5)
    both = one_view.repeat(2)
    loss = ParametricContrastiveLoss(**PACO, log_prior_C=class_prior(COUNTS), smoothing=0.1)
    queue = QueueSnapshot.of(keys, queue_labels, CLASSES)
    ours = loss(Anchors(both, logits, torch.cat([q, k]), None, queue)).loss

    total: Any = 0.0
    for i in range(8):  # GPaCo's own words: A(i) is the other 2 B - 1 views and the queue
        rows = torch.cat([torch.cat([q, k])[torch.arange(8) != i], keys])
        row_labels = torch.cat([both[torch.arange(8) != i], queue_labels])
        z = logits[i] + class_prior(COUNTS).double()
        log_p = torch.cat([z, rows @ torch.cat([q, k])[i] / 0.2]).log_softmax(0)
        centers = torch.full((CLASSES,), 0.1 / (CLASSES - 1), dtype=torch.float64)
        weight = torch.cat([centers, 0.05 * (row_labels == both[i]).double()])
        weight[both[i]] = 0.9
        total = total - (weight * log_p).sum() / weight.sum() / 8
    inputs = (q, k, logits)
    torch.testing.assert_close(ours, total, **CLOSE)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs), torch.autograd.grad(total, inputs), **CLOSE)


class TestExperts:
    """A RIDE model's experts are attention heads that share labels."""

    @pytest.mark.parametrize(
        "settings",
        [PACO | {"log_prior_C": class_prior(COUNTS)}, SUPCON | {"contrast_bias_C": class_prior(COUNTS)}],
        ids=["paco", "supcon_with_bias"],
    )
    @pytest.mark.parametrize("length", [0, 1, 30])
    def test_loss_is_the_mean_over_experts(self, settings, length):
        """Value, gradients and probabilities are those of each expert by itself."""
        experts, batch = 3, 6
        query, key = unit(experts, batch, DIM, seed=0).requires_grad_(), unit(experts, batch, DIM, seed=1)
        logits = (2 * unit(experts, batch, CLASSES, seed=2)).requires_grad_()
        keys, y, queue_y = unit(length, experts * DIM, seed=3), labels(batch, 4), labels(length, 5)
        queue = QueueSnapshot.of(keys, queue_y, CLASSES).experts(experts)
        assert queue.class_sum_CD.shape == (experts, CLASSES, DIM)
        output = ParametricContrastiveLoss(**settings)(Anchors(y, logits, query, key, queue))
        single = ParametricContrastiveLoss(**settings)
        probabilities = []
        total: Any = 0.0
        for e in range(experts):
            own_keys = keys.unflatten(1, (experts, DIM))[:, e]
            total = total + reference(y, logits[e], query[e], key[e], own_keys, queue_y, **settings) / experts
            own_queue = QueueSnapshot.of(own_keys.contiguous(), queue_y, CLASSES)
            alone = single(Anchors(y, logits[e], query[e], key[e], own_queue))
            probabilities.append(alone.positive_probability_B)
        inputs = (query, logits) if settings.get("centers", True) else (query,)
        torch.testing.assert_close(output.loss, total, **CLOSE)
        gradients = torch.autograd.grad(output.loss, inputs), torch.autograd.grad(total, inputs)
        torch.testing.assert_close(*gradients, **CLOSE)
        torch.testing.assert_close(output.positive_probability_B, torch.stack(probabilities).mean(0), equal_nan=True)

    def test_their_keys_lie_side_by_side_in_one_queue(self):
        """One ring of dimension E x D, seen as [E, N, D] without a copy."""
        ring = KeyQueue(8, 3 * DIM)
        ring.push(unit(11, 3 * DIM, seed=0).float(), labels(11, 1))
        queue = ring.snapshot(CLASSES).experts(3)
        assert queue.keys_ND.untyped_storage().data_ptr() == ring.keys_KD.untyped_storage().data_ptr()
        assert torch.equal(queue.keys_ND[1], ring.keys_KD[:, DIM : 2 * DIM])
        assert len(queue) == 8
        with pytest.raises(ValueError, match="does not divide among 5 experts"):
            ring.snapshot(CLASSES).experts(5)


class TestMultiTask:
    @pytest.mark.parametrize("log_prior_C", [None, class_prior(COUNTS)], ids=["cross_entropy", "balanced_softmax"])
    @pytest.mark.parametrize("weight", [1.0, 0.3])
    def test_is_the_weighted_sum_of_two_losses(self, log_prior_C, weight):
        """Each term with its own denominator; SupCon re-weighted by effective numbers, with a bias."""
        query, logits = unit(6, DIM, seed=0).requires_grad_(), (2 * unit(6, CLASSES, seed=2)).requires_grad_()
        key, keys, y, queue_y = unit(6, DIM, seed=1), unit(20, DIM, seed=3), labels(6, 4), labels(20, 5)
        softmax: dict[str, Any] = {"alpha": 0.0, "temperature": 1.0, "contrast": False, "log_prior_C": log_prior_C}
        supcon = SUPCON | {"class_weight_C": effective_number_weights(COUNTS), "contrast_bias_C": class_prior(COUNTS)}
        loss = MultiTaskLoss(ParametricContrastiveLoss(**softmax), ParametricContrastiveLoss(**supcon), weight)
        ours = loss(Anchors(y, logits, query, key, QueueSnapshot.of(keys, queue_y, CLASSES))).loss
        terms = [reference(y, logits, query, key, keys, queue_y, **settings) for settings in (softmax, supcon)]
        expected = terms[0] + weight * terms[1]
        torch.testing.assert_close(ours, expected, **CLOSE)
        inputs = (query, logits)
        torch.testing.assert_close(torch.autograd.grad(ours, inputs), torch.autograd.grad(expected, inputs), **CLOSE)

    @pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
    def test_refuses_a_weight_that_is_not_positive(self, weight):
        """A term of weight 0 is one not to ask for."""
        softmax = ParametricContrastiveLoss(**PACO, contrast=False)
        with pytest.raises(ValueError, match="positive weight"):
            MultiTaskLoss(softmax, ParametricContrastiveLoss(**SUPCON), weight)

    def test_refuses_terms_of_the_wrong_kind(self):
        """PaCo has centers and contrast in one denominator: it is no term of a sum."""
        with pytest.raises(ValueError, match="contrast=True"):
            MultiTaskLoss(ParametricContrastiveLoss(**PACO), ParametricContrastiveLoss(**SUPCON))


class TestEffectiveNumber:
    def test_weights_are_those_of_the_formula(self):
        """(1 - b) / (1 - b^n), scaled to a mean of 1."""
        expected = [(1 - 0.999) / (1 - 0.999**n) for n in COUNTS]
        expected = [len(COUNTS) * e / sum(expected) for e in expected]
        assert effective_number_weights(COUNTS).tolist() == pytest.approx(expected)
        assert effective_number_weights(COUNTS).mean().item() == pytest.approx(1)

    def test_beta_of_0_weighs_all_alike(self):
        """And near 1 they are inverse to the counts."""
        assert effective_number_weights(COUNTS, beta=0.0).tolist() == pytest.approx([1] * 5)
        nearly = effective_number_weights(COUNTS, beta=1 - 1e-9)
        assert (nearly[4] / nearly[0]).item() == pytest.approx(50, rel=1e-4)

    @pytest.mark.parametrize(("counts", "beta"), [([3, 0], 0.9), ([3, 1], 1.0), ([], 0.9)])
    def test_refuses_what_has_no_weight(self, counts, beta):
        """No image, no effective number."""
        with pytest.raises(ValueError, match="an image of each class"):
            effective_number_weights(counts, beta)

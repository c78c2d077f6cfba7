"""Gradients in float32 beside float64, and what the loss keeps for backward."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from paco_ds.contrast.key_queue import KeyQueue
from paco_ds.losses.base import Anchors
from paco_ds.losses.paco import ParametricContrastiveLoss, class_prior
from tests.resident import peak_extra_bytes

DIM, ALPHA, TEMPERATURE = 128, 0.05, 0.2
MIB = 2**20


@dataclass
class Case:
    """A micro-batch of unit rows and the full queue it meets; labels as long-tailed as Zipf's."""

    labels: Tensor
    logits: Tensor
    query: Tensor
    key: Tensor
    queue: KeyQueue
    log_prior: Tensor

    def loss(self) -> Tensor:
        loss = ParametricContrastiveLoss(alpha=ALPHA, temperature=TEMPERATURE, log_prior_C=self.log_prior)
        snapshot = self.queue.snapshot(len(self.log_prior))
        return loss(Anchors(self.labels, self.logits, self.query, self.key, snapshot)).loss

    def exact_loss(self) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Eq. (4) as one softmax over centers, batch and queue, in float64; its inputs, queries and center logits."""
        query, logits = (t.detach().double().requires_grad_() for t in (self.query, self.logits))
        rows = torch.cat([query, self.key.double(), self.queue.keys_KD.double()])
        same = self.labels[:, None] == torch.cat([self.labels, self.labels, self.queue.labels_K])
        itself = torch.eye(len(query), len(rows), dtype=torch.bool)
        scores = (query @ rows.T / TEMPERATURE).masked_fill(itself, -torch.inf)
        log_p = torch.cat([logits + self.log_prior.double(), scores], 1).log_softmax(1)
        own_center = F.one_hot(self.labels, logits.shape[1]).double()
        weights = torch.cat([own_center, ALPHA * (same & ~itself).double()], 1)
        terms = torch.where(weights > 0, weights * log_p, 0.0)
        return -(terms.sum(1) / weights.sum(1)).mean(), (query, logits)


def made(anchors: int, classes: int, keys: int, clustered: bool = False) -> Case:
    """Rows independent of their labels or, `clustered`, close to one direction of each class."""
    generator = torch.Generator().manual_seed(0)
    counts = 1000 / torch.arange(1, classes + 1)
    labels, queue_labels = (
        torch.multinomial(counts, n, replacement=True, generator=generator) for n in (anchors, keys)
    )
    directions = torch.randn(classes, DIM, generator=generator)

    def unit(of: Tensor) -> Tensor:
        noise = torch.randn(len(of), DIM, generator=generator)
        return F.normalize(directions[of] + 0.1 * noise if clustered else noise, dim=1)

    queue = KeyQueue(keys, DIM)
    queue.push(unit(queue_labels), queue_labels)
    logits = torch.randn(anchors, classes, generator=generator).requires_grad_()
    return Case(labels, logits, unit(labels).requires_grad_(), unit(labels), queue, class_prior(counts))


def kept_for_backward(case: Case) -> int:
    """Bytes of the storages that autograd saves, each counted once, inputs among them."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that its address stays its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.loss()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(("clustered", "limit"), [(False, 1e-6), (True, 1e-5)], ids=["random", "clustered"])
@pytest.mark.parametrize("size", [(32, 500, 4096), (1, 2, 1), (100, 3000, 1000)], ids=str)
def test_gradients_are_those_of_float64(size, clustered, limit):
    """Relative, of queries and center logits, against the equation in float64."""
    anchors, classes, keys = size
    case = made(anchors, classes, keys, clustered)
    ours = torch.autograd.grad(case.loss(), (case.query, case.logits))
    for gradient, exact in zip(ours, torch.autograd.grad(*case.exact_loss()), strict=True):
        assert float((gradient - exact).norm() / exact.norm()) < limit


def test_bytes_kept_for_backward_do_not_depend_on_the_queue():
    """One and 16 times the keys keep the same, and of anchors x classes there is one copy."""
    kept = [kept_for_backward(made(32, 500, keys)) for keys in (512, 8192)]
    assert kept[0] == kept[1]
    copy, rows = 4 * 32 * 500, 4 * 32 * DIM
    assert copy < kept[0] < copy + 4 * rows


@pytest.mark.parametrize(("anchors", "classes"), [(512, 10), (64, 100), (64, 128)])
def test_with_few_classes_the_scores_of_the_batch_are_not_kept(anchors, classes):
    """At most two copies of anchors x classes, beside the gradient of the queries and the inputs."""
    rows = 4 * anchors * DIM
    kept = kept_for_backward(made(anchors, classes, 512))
    assert kept < 2 * 4 * anchors * classes + 3 * rows


def train_step(classes: int, keys: int):
    """One forward and backward of 32 anchors, its inputs, the queue's sums and the threads ready."""
    case = made(32, classes, keys)
    snapshot = case.queue.snapshot(classes)
    loss = ParametricContrastiveLoss(alpha=ALPHA, temperature=TEMPERATURE, log_prior_C=case.log_prior)
    logits, query = (t[:1].detach().requires_grad_() for t in (case.logits, case.query))
    loss(Anchors(case.labels[:1], logits, query, case.key[:1], snapshot)).loss.backward()
    inputs = case.logits, case.query
    return lambda: torch.autograd.grad(loss(Anchors(case.labels, *inputs, case.key, snapshot)).loss, inputs)


def test_peak_memory_is_two_copies_of_anchors_x_classes():
    """200,000 classes: logits with prior, which become their softmax in place, and the gradient; never a third."""
    copy = 4 * 32 * 200_000
    assert 1.9 * copy < peak_extra_bytes(train_step, 200_000, 512) < 2.5 * copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("scores", [1, 7, 1025, 8398, 100_001])
def test_softmax_may_be_written_over_its_scores(scores, experts, dtype):
    """What the loss asks of torch, bit for bit: also in a row whose scores are -inf but one."""
    score_EBS = 20 * torch.randn(experts, 5, scores, dtype=dtype, generator=torch.Generator().manual_seed(0))
    score_EBS[0, 0, 1:] = -torch.inf
    expected = score_EBS.softmax(2)
    torch.softmax(score_EBS, 2, out=score_EBS)
    assert torch.equal(score_EBS, expected)


def test_peak_memory_does_not_grow_with_the_queue():
    """65,536 keys: anchors x keys alone would be 8 MiB, a copy of the queue 32."""
    assert peak_extra_bytes(train_step, 10, 65_536) < 6 * MIB

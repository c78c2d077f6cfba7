"""Gradients in float32 beside float64, and what the loss keeps for backward."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from paco_ds.contrast.key_queue import KeyQueue
from paco_ds.losses.paco import ParametricContrastiveLoss, class_prior

# As `python tools/bench/loss.py` has it: benches are scripts that find their shared module beside them.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "bench"))

import loss as bench
from report import peak_extra_bytes

SIZE = bench.Size(32, 500, 4096)
MIB = 2**20


@pytest.mark.parametrize(("clustered", "limit"), [(False, 1e-6), (True, 1e-5)], ids=["random", "clustered"])
@pytest.mark.parametrize("size", [SIZE, bench.Size(1, 2, 1), bench.Size(100, 3000, 1000)], ids=str)
def test_gradients_are_those_of_float64(size, clustered, limit):
    """Relative, of queries and center logits, against the published formulation in float64."""
    assert bench.gradient_error(size, clustered=clustered) < limit


def test_bytes_kept_for_backward_do_not_depend_on_the_queue():
    """One and 16 times the keys keep the same, and of anchors x classes there is one copy."""
    kept = [bench.saved_by_ours(bench.Size(SIZE.anchors, SIZE.classes, length)) for length in (512, 8192)]
    assert kept[0] == kept[1]
    copy, rows = 4 * SIZE.anchors * SIZE.classes, 4 * SIZE.anchors * bench.DIM
    assert copy < kept[0] < copy + 4 * rows


@pytest.mark.parametrize(("anchors", "classes"), [(512, 10), (64, 100), (64, 128)])
def test_with_few_classes_the_scores_of_the_batch_are_not_kept(anchors, classes):
    """At most two copies of anchors x classes, beside the gradient of the queries and the inputs."""
    rows = 4 * anchors * bench.DIM
    kept = bench.saved_by_ours(bench.Size(anchors, classes, 512))
    assert kept < 2 * 4 * anchors * classes + 3 * rows


def train_step(classes: int, keys: int):
    """One forward and backward of 32 anchors, its inputs and the threads ready."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(classes, (32,), generator=generator)
    logits = torch.randn(32, classes, generator=generator).requires_grad_()
    query, key = (F.normalize(torch.randn(32, 128, generator=generator), dim=1) for _ in range(2))
    queue = KeyQueue(keys, 128)
    queue.push(F.normalize(torch.randn(keys, 128, generator=generator), dim=1), torch.arange(keys) % classes)
    loss = ParametricContrastiveLoss(alpha=0.05, temperature=0.2, log_prior_C=class_prior([1] * classes))
    query.requires_grad_()
    snapshot = queue.snapshot(classes)
    warm = [t[:1].detach().requires_grad_() for t in (logits, query)]
    loss(y[:1], warm[0], warm[1], key[:1], snapshot).loss.backward()
    return lambda: torch.autograd.grad(loss(y, logits, query, key, snapshot).loss, (logits, query))


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

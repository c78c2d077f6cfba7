"""Loss and queue on CUDA against the CPU; skipped where there is no CUDA."""

import pytest
import torch
from torch.nn import functional as F

from paco_ds.contrast.key_queue import KeyQueue, QueueSnapshot
from paco_ds.losses import queue_attention as attention
from paco_ds.losses.base import Anchors
from paco_ds.losses.paco import ParametricContrastiveLoss, class_prior

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def unit_rows(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, 128, dtype=torch.float64, generator=generator), dim=1)


def test_the_fused_kernel_is_chosen():
    """The memory-efficient kernel answers its question as the plain path does; float64 has no such kernel."""
    assert attention._chosen("cuda", torch.float32) is attention.attend_efficient_cuda
    assert attention._chosen("cuda", torch.float64) is attention.attend_tiled


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("keys", [1, 100, 1025, 10_000, 65_536])
def test_queue_attention_equals_the_cpu(keys, experts, biased):
    """Output and logsumexp in float64 and float32, over several parts, of experts, with a bias."""
    query_EBD = torch.stack([unit_rows(16, seed) for seed in range(experts)])
    keys_EKD = torch.stack([unit_rows(keys, 10 + seed) for seed in range(experts)])
    bias_K = torch.linspace(-3, 0, keys, dtype=torch.float64) if biased else None
    results = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float64), ("cuda", torch.float32)):
        query, rows = query_EBD.to(device, dtype), keys_EKD.to(device, dtype)
        bias = None if bias_K is None else bias_K.to(device, dtype)
        results.append([t.cpu().double() for t in attention.queue_attention(query, rows, 0.07, bias)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(results[2], results[0], rtol=1e-4, atol=1e-4)


def test_peak_memory_does_not_grow_with_the_queue():
    """262,144 keys and 256 anchors: their scores alone would be 256 MiB."""
    query, rows = unit_rows(256, 0).float().cuda()[None], unit_rows(262_144, 1).float().cuda()[None]
    attention.queue_attention(query, rows[:, :2048], 0.2)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention.queue_attention(query, rows, 0.2)
    assert torch.cuda.max_memory_allocated() - before < 64 * 2**20


@pytest.mark.parametrize("classes", [10, 1000, 8142, 100_001])
def test_loss_equals_the_cpu_under_autocast(classes):
    """PaCo with prior: float32 under bfloat16 autocast, equal to float64 on the CPU; rows that torch's softmax, which
    is written over its scores, keeps in registers, in shared memory and in neither."""
    labels_B = torch.arange(16) % 10
    logits_BC = torch.randn(16, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    losses, gradients = [], []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        queue = QueueSnapshot.of(unit_rows(500, 1).to(device), torch.arange(500, device=device) % 10, classes)
        loss = ParametricContrastiveLoss(alpha=0.05, temperature=0.2, log_prior_C=class_prior([5] * classes)).to(device)
        inputs = [t.to(device, dtype).requires_grad_() for t in (logits_BC, unit_rows(16, 3), unit_rows(16, 4))]
        with torch.autocast(device, torch.bfloat16):
            losses.append(loss(Anchors(labels_B.to(device), inputs[0], inputs[1], inputs[2], queue)).loss)
        gradients.append([g.cpu().double() for g in torch.autograd.grad(losses[-1], inputs)])
    assert losses[1].dtype == torch.float32
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_queue_and_its_sums_are_deterministic():
    """Repeated on CUDA the sums are bit-equal; slots and digest are those of the CPU."""
    keys, labels = unit_rows(5000, 5).float(), torch.arange(5000) % 17
    queues = [KeyQueue(4096, 128, device) for device in ("cpu", "cuda")]
    for queue in queues:
        queue.push(keys, labels)
    assert int(queues[0].digest()) == int(queues[1].digest())
    sums = [queues[1].snapshot(17).class_sum_CD for _ in range(5)]
    assert all(torch.equal(each, sums[0]) for each in sums)
    torch.testing.assert_close(sums[0].cpu(), queues[0].snapshot(17).class_sum_CD, rtol=1e-4, atol=1e-4)

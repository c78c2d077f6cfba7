"""Loss and queue on CUDA against the CPU; skipped where there is no CUDA."""

import pytest
import torch
from torch.nn import functional as F

from paco_ds.key_queue import KeyQueue, QueueSnapshot
from paco_ds.losses.paco import ParametricContrastiveLoss, class_prior
from paco_ds.losses.queue_attention import queue_logsumexp

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def unit_rows(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, 128, dtype=torch.float64, generator=generator), dim=1)


@pytest.mark.parametrize("keys", [1, 100, 10_000])
def test_queue_logsumexp_equals_the_cpu(keys):
    """Values and gradients in float64 and float32, over several tiles."""
    query_BD, keys_KD = unit_rows(16, 0), unit_rows(keys, 1)
    results = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float64), ("cuda", torch.float32)):
        query = query_BD.detach().to(device, dtype).requires_grad_()
        lse_B = queue_logsumexp(query, keys_KD.to(device, dtype), 0.07)
        lse_B.sum().backward()
        results.append((lse_B.detach().cpu().double(), query.grad.cpu().double()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(results[2], results[0], rtol=1e-4, atol=1e-4)


def test_loss_equals_the_cpu_under_autocast():
    """PaCo with prior: float32 under bfloat16 autocast, equal to float64 on the CPU."""
    labels_B = torch.arange(16) % 10
    logits_BC = torch.randn(16, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    losses = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        queue = QueueSnapshot.of(unit_rows(500, 1).to(device), torch.arange(500, device=device) % 10, 10)
        loss = ParametricContrastiveLoss(alpha=0.05, temperature=0.2, log_prior_C=class_prior([5] * 10)).to(device)
        inputs = [t.to(device, dtype) for t in (logits_BC, unit_rows(16, 3), unit_rows(16, 4))]
        with torch.autocast(device, torch.bfloat16):
            losses.append(loss(labels_B.to(device), *inputs, queue).loss)
    assert losses[1].dtype == torch.float32
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)


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

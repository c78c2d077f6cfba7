"""Attention over the queue: every implementation against plain softmax and logsumexp, values and gradients."""

import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from paco_ds.losses import queue_attention as module
from paco_ds.losses.queue_attention import PART_KEYS, attend_flash_cpu, attend_tiled, queue_attention


def tiled_16(query_EBD, keys_EKD, scale, bias_K=None):
    return attend_tiled(query_EBD, keys_EKD, scale, bias_K, tile_keys=16)


each_implementation = pytest.mark.parametrize("attend", [attend_flash_cpu, tiled_16], ids=["flash_cpu", "tiled"])
PARTS = [1, 15, 16, 17, 100, 2 * PART_KEYS - 1, 2 * PART_KEYS, 3 * PART_KEYS + 2, 16 * PART_KEYS + 15]


def unit_rows(rows: int, dim: int = 12, seed: int = 0, experts: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(experts, rows, dim, dtype=torch.float64, generator=generator), dim=2)


def plain(query_EBD, keys_EKD, scale, bias_K=None):
    score_EBK = scale * query_EBD @ keys_EKD.mT + (0.0 if bias_K is None else bias_K)
    return score_EBK.softmax(2) @ keys_EKD, score_EBK.logsumexp(2)


@each_implementation
@pytest.mark.parametrize("scale", [5.0, 1e4], ids=["usual", "logits_1e4"])
@pytest.mark.parametrize("keys", PARTS)
@pytest.mark.parametrize("batch", [1, 5])
def test_implementations_equal_the_plain_one(attend, batch, keys, scale):
    """Output and logsumexp agree in float64, around the edges of a tile and of a part too."""
    query, rows = unit_rows(batch), unit_rows(keys, seed=1)
    torch.testing.assert_close(attend(query, rows, scale), plain(query, rows, scale), rtol=1e-12, atol=1e-12)


@each_implementation
@pytest.mark.parametrize("keys", PARTS)
def test_experts_and_bias(attend, keys):
    """Each expert has its own keys, side by side in one buffer; a key's bias counts for all anchors of all experts."""
    query, beside = unit_rows(4, experts=3), unit_rows(keys, dim=36, seed=1)[0]
    rows = beside.unflatten(1, (3, 12)).transpose(0, 1)
    bias_K = 3 * torch.randn(keys, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        attend(query, rows, 5.0, bias_K), plain(query, rows, 5.0, bias_K), rtol=1e-12, atol=1e-12
    )


@each_implementation
def test_float32_agrees_with_float64(attend):
    """Single precision loses single precision, no more."""
    query, rows = unit_rows(5), unit_rows(2000, seed=1)
    lse_EB = attend(query.float(), rows.float(), 5.0)[1]
    assert lse_EB.dtype == torch.float32
    torch.testing.assert_close(lse_EB.double(), plain(query, rows, 5.0)[1], rtol=1e-6, atol=1e-6)


@each_implementation
def test_transposed_inputs_are_read_rightly(attend):
    """Rows whose last dimension is not contiguous give the same as their copies."""
    query, rows = unit_rows(5).mT.contiguous().mT, unit_rows(1100, seed=1).mT.contiguous().mT
    assert query.stride(2) != 1
    torch.testing.assert_close(attend(query, rows, 5.0), plain(query, rows, 5.0))


@each_implementation
@pytest.mark.parametrize(("where", "value"), [("query", "nan"), ("query", "inf"), ("keys", "nan")])
@pytest.mark.parametrize("keys", [5, 20, 1100])
def test_what_is_not_finite_stays_visible(attend, keys, where, value):
    """A query or key that is not finite gives an lse that the guard of the step can see."""
    query, rows = unit_rows(5), unit_rows(keys, seed=1)
    (query if where == "query" else rows)[0, 2, 3] = float(value)
    assert not attend(query, rows, 5.0)[1][0, 2].isfinite()


@each_implementation
@pytest.mark.parametrize("keys", [1, 40, 1100])
def test_output_is_the_gradient_of_the_logsumexp(attend, keys):
    """output / temperature is what autograd gives for torch.logsumexp."""
    query, rows = unit_rows(4).requires_grad_(), unit_rows(keys, seed=1)
    (gradient,) = torch.autograd.grad(plain(query, rows, 5.0)[1].sum(), query)
    torch.testing.assert_close(5.0 * attend(query.detach(), rows, 5.0)[0], gradient, rtol=1e-12, atol=1e-12)


def test_bits_do_not_depend_on_the_number_of_threads():
    """Few anchors are shared out over the cores by parts of the keys, whose number the cores do not change."""
    query, rows, threads = unit_rows(32).float(), unit_rows(8192, seed=1).float(), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(attend_flash_cpu(query, rows, 5.0))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.fixture
def chosen_anew():
    module._chosen.cache_clear()
    yield
    module._chosen.cache_clear()


def test_the_fused_kernel_is_chosen_on_the_cpu(chosen_anew):
    """It answers the question it is asked before use."""
    assert module._chosen("cpu", torch.float32) is attend_flash_cpu


def test_tracing_on_fake_tensors_does_not_spoil_the_choice(chosen_anew):
    """Planning runs the loss without numbers, and may be the first to ask."""
    with FakeTensorMode():
        output_EBD, lse_EB = queue_attention(torch.empty(2, 4, 8), torch.empty(2, 1030, 8), 0.2)
    assert (output_EBD.shape, lse_EB.shape) == ((2, 4, 8), (2, 4))
    assert module._chosen("cpu", torch.float32) is attend_flash_cpu


@pytest.mark.parametrize("fault", ["base_2", "gone"])
def test_a_kernel_that_answers_wrongly_is_not_used(fault, chosen_anew, monkeypatch, caplog):
    """Another torch may mean something else by a private operator: the plain path takes over and a warning says so."""

    def changed(query_EBD, keys_EKD, scale, bias_K=None):
        if fault == "gone":
            raise AttributeError("no such operator")
        output, lse = attend_tiled(query_EBD, keys_EKD, scale, bias_K)
        return output, lse / 0.6931471805599453

    monkeypatch.setattr(module, "attend_flash_cpu", changed)
    with caplog.at_level(logging.WARNING):
        assert module._chosen("cpu", torch.float32) is attend_tiled
    assert "the plain path is used" in caplog.text


@pytest.mark.parametrize(
    ("query", "keys", "message"),
    [
        (torch.zeros(1, 4, 8), torch.zeros(1, 0, 8), "leave the term out"),
        (torch.zeros(1, 0, 8), torch.zeros(1, 4, 8), "leave the term out"),
        (torch.zeros(1, 4, 8), torch.zeros(1, 4, 7), "one D"),
        (torch.zeros(2, 4, 8), torch.zeros(1, 4, 8), "one E"),
        (torch.zeros(4, 8), torch.zeros(4, 8), r"\[E, B, D\]"),
        (torch.zeros(1, 4, 8), torch.zeros(1, 4, 8).double(), "both in float32"),
        (torch.zeros(1, 4, 8).half(), torch.zeros(1, 4, 8).half(), "both in float32"),
    ],
)
def test_refused_inputs(query, keys, message):
    """What would end the process or mean nothing is refused with a reason."""
    with pytest.raises(ValueError, match=message):
        queue_attention(query, keys, 0.2)


def test_refuses_a_bias_that_is_not_one_per_key():
    """It would be broadcast."""
    with pytest.raises(ValueError, match="one bias per key"):
        queue_attention(torch.zeros(1, 4, 8), torch.zeros(1, 5, 8), 0.2, torch.zeros(1))

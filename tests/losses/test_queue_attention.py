"""logsumexp over the queue: every implementation against torch.logsumexp, values and gradients."""

import pytest
import torch
from torch.nn import functional as F

from paco_ds.losses import queue_attention
from paco_ds.losses.queue_attention import attend_flash_cpu, attend_tiled, queue_logsumexp

IMPLEMENTATIONS = [attend_flash_cpu, lambda q, k, scale: attend_tiled(q, k, scale, tile_keys=16)]
each_implementation = pytest.mark.parametrize("attend", IMPLEMENTATIONS, ids=["flash_cpu", "tiled"])


def unit_rows(rows: int, dim: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, dtype=torch.float64, generator=generator), dim=1)


def plain(query_BD, keys_KD, scale):
    score_BK = scale * query_BD @ keys_KD.T
    return score_BK.softmax(1) @ keys_KD, score_BK.logsumexp(1)


@each_implementation
@pytest.mark.parametrize("scale", [5.0, 1e4], ids=["usual", "logits_1e4"])
@pytest.mark.parametrize("keys", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("batch", [1, 5])
def test_implementations_equal_the_plain_one(attend, batch, keys, scale):
    """Attention output and logsumexp agree in float64, around the edges of a tile too."""
    query_BD, keys_KD = unit_rows(batch), unit_rows(keys, seed=1)
    torch.testing.assert_close(
        attend(query_BD, keys_KD, scale), plain(query_BD, keys_KD, scale), rtol=1e-12, atol=1e-12
    )


@each_implementation
def test_float32_agrees_with_float64(attend):
    """Single precision loses single precision, no more."""
    query_BD, keys_KD = unit_rows(5), unit_rows(100, seed=1)
    lse_B = attend(query_BD.float(), keys_KD.float(), 5.0)[1]
    assert lse_B.dtype == torch.float32
    torch.testing.assert_close(lse_B.double(), plain(query_BD, keys_KD, 5.0)[1], rtol=1e-6, atol=1e-6)


@each_implementation
def test_transposed_inputs_are_read_rightly(attend):
    """Rows whose last dimension is not contiguous give the same as their copies."""
    query_BD, keys_KD = unit_rows(5).T.contiguous().T, unit_rows(20, seed=1).T.contiguous().T
    assert query_BD.stride(1) != 1
    torch.testing.assert_close(attend(query_BD, keys_KD, 5.0), plain(query_BD, keys_KD, 5.0))


@each_implementation
@pytest.mark.parametrize(("where", "value"), [("query", "nan"), ("query", "inf"), ("keys", "nan")])
@pytest.mark.parametrize("keys", [5, 20])
def test_what_is_not_finite_stays_visible(attend, keys, where, value):
    """A query or key that is not finite gives an lse that the guard of the step can see."""
    query_BD, keys_KD = unit_rows(5), unit_rows(keys, seed=1)
    (query_BD if where == "query" else keys_KD)[2, 3] = float(value)
    assert not attend(query_BD, keys_KD, 5.0)[1][2].isfinite()


@pytest.mark.parametrize("keys", [1, 40])
def test_gradient_of_the_query(keys):
    """gradcheck, and equality with the gradient of torch.logsumexp under a weighted sum."""
    query_BD, keys_KD = unit_rows(4).requires_grad_(), unit_rows(keys, seed=1)
    assert torch.autograd.gradcheck(lambda q: queue_logsumexp(q, keys_KD, 0.3), (query_BD,))
    weight_B = torch.tensor([1.0, -2.0, 0.0, 0.5], dtype=torch.float64)
    ours = torch.autograd.grad((weight_B * queue_logsumexp(query_BD, keys_KD, 0.3)).sum(), query_BD)
    theirs = torch.autograd.grad((weight_B * plain(query_BD, keys_KD, 1 / 0.3)[1]).sum(), query_BD)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@each_implementation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_computed_in_float32(dtype, attend, monkeypatch):
    """Half inputs under autocast give the float32 result of their values; gradients go back in half."""
    monkeypatch.setattr(queue_attention, "_attend", attend)
    query_BD, keys_KD = unit_rows(4).to(dtype).requires_grad_(), unit_rows(20, seed=1).to(dtype)
    expected_B = queue_logsumexp(query_BD.float(), keys_KD.float(), 0.2)
    with torch.autocast("cpu", torch.bfloat16):
        lse_B = queue_logsumexp(query_BD, keys_KD, 0.2)
    assert lse_B.dtype == torch.float32
    assert torch.equal(lse_B, expected_B)
    lse_B.sum().backward()
    assert query_BD.grad.dtype == dtype


@pytest.mark.parametrize(
    ("query_shape", "keys_shape", "temperature", "message"),
    [
        ((4, 8), (0, 8), 0.2, "leave the term out"),
        ((0, 8), (4, 8), 0.2, "leave the term out"),
        ((4, 8), (4, 7), 0.2, "one dimension D"),
        ((4, 8), (4, 8), 0.0, "temperature must be positive"),
    ],
)
def test_refused_inputs(query_shape, keys_shape, temperature, message):
    """What would end the process or mean nothing is refused with a reason."""
    with pytest.raises(ValueError, match=message):
        queue_logsumexp(torch.zeros(query_shape), torch.zeros(keys_shape), temperature)


def test_keys_with_gradient_are_refused():
    """Keys would silently get no gradient."""
    with pytest.raises(ValueError, match="detach them"):
        queue_logsumexp(unit_rows(2), unit_rows(2).requires_grad_(), 0.2)

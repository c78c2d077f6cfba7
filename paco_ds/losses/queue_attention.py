"""Logsumexp over the key queue and its gradient, both from one attention call that keeps nothing K-sized.

Queue keys carry no gradient, so with values V = K the output of attention is the gradient. With s_k = q.k / tau + b_k::

    lse = logsumexp_k(s_k)        d lse / d q = sum_k softmax(s)_k k / tau = output / tau

Shapes: E experts (attention heads), B anchors, K keys, D dimension, S parts that the keys are cut into.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

log = logging.getLogger(__name__)

Attend = Callable[[Tensor, Tensor, float, Tensor | None], tuple[Tensor, Tensor]]
"""(query_EBD, keys_EKD, scale, bias_K or None) -> (output_EBD, lse_EB)."""

TILE_KEYS = 4096
"""Keys scored at a time where no fused kernel is used: bounds the extra memory to E x B x TILE_KEYS."""

PART_KEYS = 512
"""Least number of keys in a part: what the fused kernels take at a time anyway."""


def queue_attention(
    query_EBD: Tensor, keys_EKD: Tensor, temperature: float, bias_K: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return attention over the queue with V = K, and its log normaliser.

    Args:
        query_EBD: anchors, float32 or float64, any strides, B >= 1.
        keys_EKD: their dtype, any strides, K >= 1.
        temperature: tau > 0.
        bias_K: added to the scores of every query, or None.

    Returns:
        output_EBD, softmax(s) K, and lse_EB, logsumexp(s), for s = q.k / tau + b. The gradient of lse is
        output / tau.

    Raises:
        ValueError: no query or no key (leave the term out: logsumexp of nothing is -inf), shapes or dtypes that
            do not fit.
    """
    _check(query_EBD, keys_EKD, bias_K)
    attend = _chosen(query_EBD.device.type, query_EBD.dtype)
    return attend(query_EBD, keys_EKD, 1 / temperature, None if bias_K is None else bias_K.to(query_EBD.dtype))


def _check(query_EBD: Tensor, keys_EKD: Tensor, bias_K: Tensor | None) -> None:
    """Raise the ValueError of :func:`queue_attention` where one is due."""
    query, keys = query_EBD.shape, keys_EKD.shape
    if len(query) != 3 or len(keys) != 3 or query[::2] != keys[::2]:
        problem = "needs [E, B, D] and [E, K, D] of one E and one D"
    elif query_EBD.dtype != keys_EKD.dtype or query_EBD.dtype not in (torch.float32, torch.float64):
        problem = "needs both in float32 or both in float64"
    elif 0 in query or 0 in keys:
        problem = "needs something in both: leave the term out while batch or queue is empty"
    elif bias_K is not None and bias_K.shape != keys[1:2]:
        problem = f"needs one bias per key, not {tuple(bias_K.shape)}"
    else:
        return
    raise ValueError(
        f"queue_attention {problem}: got query {tuple(query)} {query_EBD.dtype} and keys {tuple(keys)} {keys_EKD.dtype}"
    )


@functools.cache
def _chosen(device: str, dtype: torch.dtype) -> Attend:
    """The implementation for a device, chosen once.

    The fused kernels are private operators of torch, whose meaning may change between versions: one is used only
    if it answers a small question as the plain path does.
    """
    fused = {("cpu", torch.float32): attend_flash_cpu, ("cpu", torch.float64): attend_flash_cpu}
    fused[("cuda", torch.float32)] = attend_efficient_cuda
    attend = fused.get((device, dtype))
    if attend is None:
        return attend_tiled
    try:
        # The answer is needed in numbers, also while a step is traced on fake tensors.
        with _disable_current_modes():
            _ask(attend, device, dtype)
    except (AssertionError, AttributeError, RuntimeError, TypeError) as error:
        log.warning(
            "torch %s does not compute the queue's attention on %s as expected (%s): the plain path is used, "
            "slower but right",
            torch.__version__,
            device,
            error,
        )
        return attend_tiled
    return attend


def _ask(attend: Attend, device: str, dtype: torch.dtype) -> None:
    """Raise an AssertionError unless the answer is the plain path's, over several parts, with and without bias."""
    generator = torch.Generator().manual_seed(0)
    keys = 2 * PART_KEYS + 1
    query_EBD, keys_EKD, bias_1K = (
        torch.randn(shape, generator=generator, device="cpu").to(device, dtype)
        for shape in ((2, 3, 16), (2, keys, 16), (1, keys))
    )
    for bias_K in (None, bias_1K[0]):
        expected = attend_tiled(query_EBD, keys_EKD, 0.3, bias_K)
        torch.testing.assert_close(attend(query_EBD, keys_EKD, 0.3, bias_K), expected, rtol=1e-4, atol=1e-4)


def attend_flash_cpu(
    query_EBD: Tensor, keys_EKD: Tensor, scale: float, bias_K: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Torch's fused CPU kernel, over parts of the keys. It ends the process on empty inputs: callers refuse them."""

    def kernel(query: Tensor, keys: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, keys, 0.0, False, attn_mask=bias, scale=scale
        )
        return output, lse.view(query.shape[:3])

    return _by_parts(kernel, query_EBD, keys_EKD, scale, bias_K, parts=16)


def attend_efficient_cuda(
    query_EBD: Tensor, keys_EKD: Tensor, scale: float, bias_K: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Torch's memory-efficient CUDA kernel, over parts of the keys; plain where there is a bias, which the kernel
    wants as a whole B x K tensor, or a dimension that it does not take."""
    if bias_K is not None or query_EBD.shape[2] % 4:
        return attend_tiled(query_EBD, keys_EKD, scale, bias_K)

    def kernel(query: Tensor, keys: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        output, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, keys, keys, bias, compute_log_sumexp=True, scale=scale
        )
        return output, lse[..., : query.shape[2]]  # the kernel pads queries to a multiple of 32

    return _by_parts(kernel, query_EBD, keys_EKD, scale, bias_K, parts=64)


def attend_tiled(
    query_EBD: Tensor, keys_EKD: Tensor, scale: float, bias_K: Tensor | None = None, tile_keys: int = TILE_KEYS
) -> tuple[Tensor, Tensor]:
    """Plain operations, on any device, `tile_keys` keys at a time."""
    outputs, lses = [], []
    for start in range(0, keys_EKD.shape[1], tile_keys):
        tile_ETD = keys_EKD[:, start : start + tile_keys]
        score_EBT = scale * (query_EBD @ tile_ETD.mT)
        if bias_K is not None:
            score_EBT += bias_K[start : start + tile_keys]
        lses.append(score_EBT.logsumexp(2))
        outputs.append(score_EBT.softmax(2) @ tile_ETD)
    return _merged(torch.stack(outputs), torch.stack(lses))


def _by_parts(
    kernel: Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]],
    query_EBD: Tensor,
    keys_EKD: Tensor,
    scale: float,
    bias_K: Tensor | None,
    parts: int,
) -> tuple[Tensor, Tensor]:
    """Hand the keys to a kernel in equal parts, as entries of its batch, and merge.

    Kernels work in parallel over batch, heads and blocks of 32 or more queries, not over keys: the 32 anchors of a
    published recipe would keep one core busy. Short sums are more precise, too. The number of parts depends on the
    number of keys alone: the same queue gives the same bits on any number of cores.
    """
    keys = keys_EKD.shape[1]
    parts = max(1, min(parts, keys // PART_KEYS))
    whole = keys - keys % parts
    # The kernels read rows as if their last dimension were contiguous: a transposed query would give garbage.
    query_EBD = query_EBD.contiguous()
    if keys_EKD.stride(2) != 1:
        keys_EKD = keys_EKD.contiguous()
    query_SEBD = query_EBD.expand(parts, *query_EBD.shape)
    keys_SEPD = keys_EKD[:, :whole].unflatten(1, (parts, -1)).transpose(0, 1)
    bias_S11P = None if bias_K is None else bias_K[:whole].view(parts, 1, 1, -1)
    output_SEBD, lse_SEB = kernel(query_SEBD, keys_SEPD, bias_S11P)
    if whole < keys:
        rest = attend_tiled(query_EBD, keys_EKD[:, whole:], scale, None if bias_K is None else bias_K[whole:])
        output_SEBD, lse_SEB = torch.cat([output_SEBD, rest[0][None]]), torch.cat([lse_SEB, rest[1][None]])
    output_EBD, lse_EB = _merged(output_SEBD, lse_SEB)
    # With a handful of keys the CPU kernel answers a query of NaN with lse = 0, unseen by the step's guard.
    return output_EBD, lse_EB + 0.0 * query_EBD.sum(2)


def _merged(output_SEBD: Tensor, lse_SEB: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over all keys from attention over each part of them."""
    if len(lse_SEB) == 1:
        return output_SEBD[0], lse_SEB[0]
    # Not logsumexp and softmax over parts: slower for a few anchors, and bits that depend on the number of threads.
    top_EB = lse_SEB.amax(0)
    weight_SEB = (lse_SEB - top_EB).exp_()
    total_EB = weight_SEB.sum(0)
    output_EBD = output_SEBD.mul_(weight_SEB[..., None]).sum(0)
    return output_EBD.div_(total_EB[..., None]), total_EB.log_().add_(top_EB)

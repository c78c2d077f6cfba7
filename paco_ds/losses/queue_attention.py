"""Owns logsumexp over the key queue, computed as one attention call that keeps nothing K-sized for backward.

Queue keys carry no gradient, so with values V = K the output of attention is the gradient:
lse_i = logsumexp_k(q_i.k / tau) and dlse_i / dq_i = softmax_k(q_i.k / tau) K / tau = output_i / tau.

Shapes: B anchors, K keys, D dimension.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE_KEYS = 4096
"""Keys scored at a time where no fused kernel is used: bounds the extra memory to B x TILE_KEYS."""


def queue_logsumexp(query_BD: Tensor, keys_KD: Tensor, temperature: float) -> Tensor:
    """Return ``logsumexp_k(q . k / temperature)`` of every query over all keys, differentiable in the query.

    Computed in float64 for a float64 query and in float32 for any other, under any autocast. The gradient is
    of first order only, and backward keeps a [B, D] tensor whatever K is.

    Args:
        query_BD: anchors, any floating dtype and any strides, B >= 1.
        keys_KD: the keys, K >= 1, without gradient; cast to the dtype of the computation.
        temperature: tau > 0.

    Returns:
        lse_B, float32 or float64.

    Raises:
        ValueError: no query or no key (leave the term out instead: logsumexp of nothing is -inf), shapes that
            do not match, keys that ask for a gradient, a temperature that is not positive.
    """
    shapes = f"query {tuple(query_BD.shape)} and keys {tuple(keys_KD.shape)}"
    if query_BD.ndim != 2 or keys_KD.ndim != 2 or query_BD.shape[1] != keys_KD.shape[1]:
        raise ValueError(f"queue_logsumexp needs [B, D] and [K, D] of one dimension D, got {shapes}")
    if 0 in query_BD.shape or 0 in keys_KD.shape:
        raise ValueError(f"queue_logsumexp got {shapes}: leave the term out while batch or queue is empty")
    if keys_KD.requires_grad:
        raise ValueError("queue_logsumexp gives keys no gradient: detach them, or make them part of the batch")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    dtype = torch.float64 if query_BD.dtype == torch.float64 else torch.float32
    with torch.autocast(query_BD.device.type, enabled=False):
        lse_B: Tensor = _QueueLogSumExp.apply(query_BD.to(dtype), keys_KD.to(dtype), 1 / temperature)
    return lse_B


class _QueueLogSumExp(torch.autograd.Function):
    """Attention's log normaliser, with attention's output kept as its gradient."""

    @staticmethod
    def forward(ctx: Any, query_BD: Tensor, keys_KD: Tensor, scale: float) -> Tensor:
        output_BD, lse_B = _attend(query_BD, keys_KD, scale)
        ctx.save_for_backward(output_BD)
        ctx.scale = scale
        return lse_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_B: Tensor) -> tuple[Tensor, None, None]:
        (output_BD,) = ctx.saved_tensors
        return grad_B[:, None] * output_BD * ctx.scale, None, None


def _attend(query_BD: Tensor, keys_KD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Choose the implementation: the one place that looks at the device. A CUDA kernel that returns its
    log-sum-exp is one more branch here and one more case of the tests."""
    if query_BD.device.type == "cpu":
        return attend_flash_cpu(query_BD, keys_KD, scale)
    return attend_tiled(query_BD, keys_KD, scale)


def attend_flash_cpu(query_BD: Tensor, keys_KD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of queries over keys with V = K by torch's fused CPU kernel: (output_BD, lse_B).

    The kernel ends the process on empty inputs: callers refuse them.
    """
    # The kernel reads rows as if their last dimension were contiguous: a transposed query would give garbage.
    query, keys = query_BD.contiguous()[None, None], keys_KD.contiguous()[None, None]
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, keys, keys, 0.0, False, scale=scale)
    # With a handful of keys the kernel answers a query of NaN with lse = 0, unseen by the step's guard.
    return output[0, 0], lse.flatten() + 0.0 * query_BD.sum(1)


def attend_tiled(query_BD: Tensor, keys_KD: Tensor, scale: float, tile_keys: int = TILE_KEYS) -> tuple[Tensor, Tensor]:
    """The same as :func:`attend_flash_cpu` in plain operations on any device, `tile_keys` keys at a time.

    Sums are kept relative to the largest score so far and rescaled when a tile brings a larger one.
    """
    largest_B = query_BD.new_full(query_BD.shape[:1], float("-inf"))
    total_B = torch.zeros_like(largest_B)
    output_BD = torch.zeros_like(query_BD)
    for tile_TD in keys_KD.split(tile_keys):
        score_BT = scale * (query_BD @ tile_TD.T)
        before_B, largest_B = largest_B, torch.maximum(largest_B, score_BT.amax(1))
        rescale_B = (before_B - largest_B).exp()
        weight_BT = (score_BT - largest_B[:, None]).exp()
        total_B = total_B * rescale_B + weight_BT.sum(1)
        output_BD = output_BD * rescale_B[:, None] + weight_BT @ tile_TD
    return output_BD / total_B[:, None], largest_B + total_B.log()

"""Owns the value of the parametric contrastive loss and its gradient, both in closed form: no graph is recorded.

For an anchor of total weight W, with denominator exp(lse), weights w_c of the centers, and r its factor in the result::

    L = r (W lse - sum_c w_c z_c - alpha sum_P s_j)
    dL / dz_c = r (W exp(z_c - lse) - w_c)                   Eq. (18) is this times the feature
    dL / ds_j = r (W gamma exp(s_j - lse) - alpha [j in P])

Queue keys have no gradient, so their sum over j is two [D] vectors: the attention output, and the class sum S_y.

Shapes: E experts (attention heads), B anchors, C classes, O others of the batch (queries, then keys), N keys in the
queue, D dimension.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from paco_ds.key_queue import QueueSnapshot
from paco_ds.losses.queue_attention import queue_attention


@dataclass(frozen=True)
class Form:
    """Which member of the family of losses: the settings of `ParametricContrastiveLoss`, documented there."""

    alpha: float
    beta: float
    gamma: float
    temperature: float
    supt: float
    smoothing: float
    divide_by_weight: bool
    log_prior_C: Tensor | None
    contrast_bias_C: Tensor | None
    class_weight_C: Tensor | None


class ClosedForm(torch.autograd.Function):
    """(loss, p_c [B] or None, p_c's optimum, p+ [B] or None, p+'s optimum); only the loss has a gradient.

    Kept for backward: the softmax of the center logits, the one tensor of anchors x classes, and the gradients of
    queries and keys. Nothing depends on the length of the queue.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_EBC: Tensor | None,
        query_EBD: Tensor | None,
        key_EBD: Tensor | None,
        labels_B: Tensor,
        queue: QueueSnapshot | None,
        form: Form,
        dtype: torch.dtype,
    ) -> tuple[Tensor | None, ...]:
        centers = None if logits_EBC is None else _Centers(logits_EBC, labels_B, form, dtype)
        contrast = None if query_EBD is None else _Contrast(query_EBD, key_EBD, labels_B, queue, form)
        terms = [centers.lse_EB] if centers else []
        if contrast and form.gamma > 0:
            terms += [lse_EB + math.log(form.gamma) for lse_EB in contrast.lses_EB()]
        if not terms:
            raise ValueError("SupCon got one image, no key and an empty queue: there is nothing to contrast")
        lse_EB = functools.reduce(torch.logaddexp, terms)
        weight_B, pull_EB = torch.zeros_like(lse_EB[0]), torch.zeros_like(lse_EB)
        if centers:
            weight_B, pull_EB = weight_B + form.beta, pull_EB + form.beta * centers.pull_EB
        if contrast:
            weight_B, pull_EB = weight_B + form.alpha * contrast.positives_B, pull_EB + form.alpha * contrast.pull_EB

        factor_B = torch.full_like(weight_B, 1 / lse_EB.numel())
        if form.class_weight_C is not None:
            factor_B = factor_B * form.class_weight_C[labels_B]
        if form.divide_by_weight:
            factor_B = (factor_B / weight_B).masked_fill_(weight_B == 0, 0.0)
        loss = (factor_B * (weight_B * lse_EB - pull_EB)).sum()
        push_EB = (factor_B * weight_B).expand_as(lse_EB)

        softmax_EBC = center_push_EB = query_grad_EBD = key_grad_EBD = None
        if centers and ctx.needs_input_grad[0]:
            softmax_EBC, center_push_EB = centers.softmax_EBC, push_EB * (centers.lse_EB - lse_EB).exp()
        if contrast and any(ctx.needs_input_grad[1:3]):
            query_grad_EBD, key_grad_EBD = contrast.gradients(
                form.gamma * push_EB if form.gamma > 0 else None, form.alpha * factor_B, lse_EB, ctx.needs_input_grad[2]
            )
        ctx.form = form
        ctx.set_materialize_grads(False)  # the probabilities' are always None
        ctx.save_for_backward(softmax_EBC, center_push_EB, form.beta * factor_B, labels_B, query_grad_EBD, key_grad_EBD)

        center_B = center_optimum_B = positive_B = positive_optimum_B = None
        if centers:
            center_B = (centers.own_EB - lse_EB).exp().mean(0)
            center_optimum_B = form.beta * (1 - form.smoothing) / weight_B
        if contrast:
            # 0 / 0 where there is no positive: nan, as documented.
            positive_B = form.gamma * (contrast.pull_EB / contrast.positives_B - lse_EB).exp().mean(0)
            positive_optimum_B = (form.alpha / weight_B).where(contrast.positives_B > 0, math.nan)
        probabilities = (center_B, center_optimum_B, positive_B, positive_optimum_B)
        ctx.mark_non_differentiable(*(p for p in probabilities if p is not None))
        return loss, *probabilities

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        softmax_EBC, center_push_EB, center_pull_B, labels_B, query_grad_EBD, key_grad_EBD = ctx.saved_tensors
        logits_grad_EBC = None
        if softmax_EBC is not None:
            push_EB, pull_B = grad / ctx.form.supt * center_push_EB, grad / ctx.form.supt * center_pull_B
            logits_grad_EBC = softmax_EBC * push_EB[..., None]
            smoothing, classes = ctx.form.smoothing, softmax_EBC.shape[2]
            if smoothing > 0:
                elsewhere_B = pull_B * (smoothing / (classes - 1))
                logits_grad_EBC -= elsewhere_B[:, None]
                pull_B = pull_B * (1 - smoothing) - elsewhere_B
            own_EB1 = labels_B[:, None].expand(*push_EB.shape, 1)
            logits_grad_EBC.scatter_(2, own_EB1, logits_grad_EBC.gather(2, own_EB1) - pull_B[:, None])
        needed = ctx.needs_input_grad
        return (
            logits_grad_EBC,
            grad * query_grad_EBD if needed[1] else None,
            grad * key_grad_EBD if needed[2] else None,
            *[None] * 4,
        )


class _Centers:
    """z = (logits + log prior) / supt: what the loss needs of it."""

    def __init__(self, logits_EBC: Tensor, labels_B: Tensor, form: Form, dtype: torch.dtype) -> None:
        z_EBC = logits_EBC.to(dtype) if form.log_prior_C is None else logits_EBC + form.log_prior_C.to(dtype)
        if form.supt != 1:
            z_EBC = z_EBC / form.supt
        classes = z_EBC.shape[2]
        self.own_EB = self.pull_EB = z_EBC.gather(2, labels_B[:, None].expand(*z_EBC.shape[:2], 1))[..., 0]
        if form.smoothing > 0:
            if classes < 2:
                raise ValueError("smoothing spreads weight over the other classes, but there is one class")
            others_EB = (z_EBC.sum(2) - self.own_EB) / (classes - 1)
            self.pull_EB = (1 - form.smoothing) * self.own_EB + form.smoothing * others_EB
        self.softmax_EBC, self.lse_EB = _softmax_and_logsumexp(z_EBC)


def _softmax_and_logsumexp(score: Tensor) -> tuple[Tensor, Tensor]:
    """Both over the last dimension: its largest probability, at least 1 / C, is exp(largest score - logsumexp)."""
    softmax = score.softmax(-1)
    return softmax, score.amax(-1) - softmax.amax(-1).log()


class _Contrast:
    """s = q.k / temperature + b over A(i): batch pair by pair, queue by its attention and class sums."""

    def __init__(
        self,
        query_EBD: Tensor,
        key_EBD: Tensor | None,
        labels_B: Tensor,
        queue: QueueSnapshot | None,
        form: Form,
    ) -> None:
        self.query_EBD, self.key_EBD, self.temperature = query_EBD, key_EBD, form.temperature
        size, dtype = len(labels_B), query_EBD.dtype
        others_EOD = query_EBD if key_EBD is None else torch.cat([query_EBD, key_EBD], 1)
        labels_O = labels_B.repeat(others_EOD.shape[1] // size)
        bias_C = None if form.contrast_bias_C is None else form.contrast_bias_C.to(dtype)
        score_EBO = query_EBD @ others_EOD.mT / form.temperature
        if bias_C is not None:
            score_EBO += bias_C[labels_O]
        self.positive_BO = (labels_B[:, None] == labels_O).to(dtype).fill_diagonal_(0)
        self.pull_EB = (score_EBO * self.positive_BO).sum(2)
        self.positives_B = self.positive_BO.sum(1)
        # A batch of one image without a key holds nothing but the anchor itself.
        self.among_batch = len(labels_O) > 1
        if self.among_batch:
            score_EBO.diagonal(dim1=1, dim2=2).fill_(-math.inf)
            self.softmax_EBO, self.batch_lse_EB = _softmax_and_logsumexp(score_EBO)

        self.attended_EBD = self.class_sum_EBD = None
        if queue is not None and len(queue):
            queue.check_current()
            keys_END = queue.keys_ND.to(dtype).expand(len(query_EBD), -1, -1)
            bias_N = None if bias_C is None else bias_C[queue.labels_N]
            self.attended_EBD, self.queue_lse_EB = queue_attention(query_EBD, keys_END, form.temperature, bias_N)
            self.class_sum_EBD = queue.class_sums(labels_B).to(dtype)
            count_B = queue.class_count_C[labels_B].to(dtype)
            self.pull_EB = self.pull_EB + (query_EBD * self.class_sum_EBD).sum(2) / form.temperature
            if bias_C is not None:
                self.pull_EB = self.pull_EB + count_B * bias_C[labels_B]
            self.positives_B = self.positives_B + count_B

    def lses_EB(self) -> list[Tensor]:
        """Logsumexp over the batch and over the queue, those that hold anything."""
        in_batch = [self.batch_lse_EB] if self.among_batch else []
        return in_batch if self.attended_EBD is None else [*in_batch, self.queue_lse_EB]

    def gradients(
        self, push_EB: Tensor | None, pull_B: Tensor, lse_EB: Tensor, want_keys: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Of queries and, if wanted, of keys, where push = r W gamma (None for 0) and pull = r alpha.

        A query moves as an anchor, and as a contrast of the other anchors: the transposed product.
        """
        size, pull_B1 = len(pull_B), pull_B[:, None]
        slope_EBO = (-pull_B1 * self.positive_BO).expand(len(lse_EB), -1, -1)
        if push_EB is not None and self.among_batch:
            slope_EBO = slope_EBO + (push_EB * (self.batch_lse_EB - lse_EB).exp())[..., None] * self.softmax_EBO
        among_EBB, to_keys_EBB = slope_EBO[..., :size], slope_EBO[..., size:]
        query_grad_EBD = (among_EBB + among_EBB.mT) @ self.query_EBD
        if self.key_EBD is not None:
            query_grad_EBD += to_keys_EBB @ self.key_EBD
        if self.attended_EBD is not None and self.class_sum_EBD is not None:
            query_grad_EBD -= pull_B1 * self.class_sum_EBD
            if push_EB is not None:
                query_grad_EBD += (push_EB * (self.queue_lse_EB - lse_EB).exp())[..., None] * self.attended_EBD
        key_grad_EBD = to_keys_EBB.mT @ self.query_EBD / self.temperature if want_keys else None
        return query_grad_EBD / self.temperature, key_grad_EBD

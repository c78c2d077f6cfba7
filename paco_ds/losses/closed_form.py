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
            terms += [_plus(math.log(form.gamma), lse_EB) for lse_EB in contrast.lses_EB()]
        if not terms:
            raise ValueError("SupCon got one image, no key and an empty queue: there is nothing to contrast")
        lse_EB = functools.reduce(torch.logaddexp, terms)
        if contrast:
            weight_B = _plus(form.beta, form.alpha * contrast.positives_B)
            pull_EB = form.alpha * contrast.pull_EB
            if centers:
                pull_EB += _times(form.beta, centers.pull_EB)
        else:
            assert centers is not None
            weight_B, pull_EB = torch.full_like(lse_EB[0], form.beta), _times(form.beta, centers.pull_EB)

        push_B = torch.full_like(weight_B, 1 / lse_EB.numel())  # r W
        if form.class_weight_C is not None:
            push_B *= form.class_weight_C[labels_B]
        if form.divide_by_weight:
            factor_B = push_B / weight_B
            if form.beta == 0:
                push_B, factor_B = (t.masked_fill(weight_B == 0, 0.0) for t in (push_B, factor_B))
        else:
            push_B, factor_B = push_B * weight_B, push_B
        loss = (push_B * lse_EB - factor_B * pull_EB).sum()
        push_EB = push_B.expand_as(lse_EB)

        softmax_EBC = center_push_EB = query_grad_EBD = key_grad_EBD = None
        if centers and ctx.needs_input_grad[0]:
            softmax_EBC, center_push_EB = centers.softmax_EBC, push_EB * (centers.lse_EB - lse_EB).exp()
        if contrast and any(ctx.needs_input_grad[1:3]):
            query_grad_EBD, key_grad_EBD = contrast.gradients(
                _times(form.gamma, push_EB) if form.gamma > 0 else None,
                form.alpha * factor_B,
                lse_EB,
                ctx.needs_input_grad[2],
            )
        ctx.form = form
        ctx.set_materialize_grads(False)  # the probabilities' are always None
        center_pull_B = _times(form.beta, factor_B)
        ctx.save_for_backward(softmax_EBC, center_push_EB, center_pull_B, labels_B, query_grad_EBD, key_grad_EBD)

        center_B = center_optimum_B = positive_B = positive_optimum_B = None
        if centers:
            center_B = (centers.own_EB - lse_EB).exp().mean(0)
            center_optimum_B = form.beta * (1 - form.smoothing) / weight_B
        if contrast:
            # 0 / 0 where there is no positive: nan, as documented.
            positive_B = _times(form.gamma, (contrast.pull_EB / contrast.positives_B - lse_EB).exp().mean(0))
            positive_optimum_B = (form.alpha / weight_B).masked_fill_(contrast.positives_B == 0, math.nan)
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
            slope = _times(1 / ctx.form.supt, grad)
            push_EB, pull_B = slope * center_push_EB, slope * center_pull_B
            logits_grad_EBC = softmax_EBC * push_EB[..., None]
            smoothing, classes = ctx.form.smoothing, softmax_EBC.shape[2]
            if smoothing > 0:
                elsewhere_B = pull_B * (smoothing / (classes - 1))
                logits_grad_EBC -= elsewhere_B[:, None]
                pull_B = pull_B * (1 - smoothing) - elsewhere_B
            own_EB1 = labels_B[:, None].expand(*push_EB.shape, 1)
            logits_grad_EBC.scatter_add_(2, own_EB1, -pull_B[:, None].expand_as(own_EB1))
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
        dtype = query_EBD.dtype
        scaled_EBD = query_EBD / form.temperature
        bias_C = None if form.contrast_bias_C is None else form.contrast_bias_C.to(dtype)
        self.others_EOD = query_EBD if key_EBD is None else torch.cat([query_EBD, key_EBD], 1)
        score_EBO = scaled_EBD @ self.others_EOD.mT
        same_BB = (labels_B[:, None] == labels_B).to(dtype)
        if key_EBD is None:
            self.positive_BO = same_BB.fill_diagonal_(0)
        else:
            self.positive_BO = torch.cat([same_BB, same_BB], 1)
            self.positive_BO.fill_diagonal_(0)
        if bias_C is not None:
            score_EBO += bias_C[labels_B.repeat(self.others_EOD.shape[1] // len(labels_B))]
        self.pull_EB = (score_EBO * self.positive_BO).sum(2)
        self.positives_B = self.positive_BO.sum(1)
        # A batch of one image without a key holds nothing but the anchor itself.
        self.among_batch = score_EBO.shape[2] > 1
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
            self.pull_EB += (scaled_EBD * self.class_sum_EBD).sum(2)
            if bias_C is not None:
                self.pull_EB += count_B * bias_C[labels_B]
            self.positives_B += count_B

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
            weight_EB = push_EB * (self.batch_lse_EB - lse_EB).exp_()
            slope_EBO = torch.addcmul(slope_EBO, weight_EB[..., None], self.softmax_EBO)
        query_grad_EBD = slope_EBO @ self.others_EOD
        query_grad_EBD.baddbmm_(slope_EBO[..., :size].mT, self.query_EBD)
        if self.attended_EBD is not None and self.class_sum_EBD is not None:
            query_grad_EBD.addcmul_(pull_B1, self.class_sum_EBD, value=-1)
            if push_EB is not None:
                weight_EB = push_EB * (self.queue_lse_EB - lse_EB).exp_()
                query_grad_EBD.addcmul_(weight_EB[..., None], self.attended_EBD)
        key_grad_EBD = slope_EBO[..., size:].mT @ self.query_EBD / self.temperature if want_keys else None
        return query_grad_EBD.div_(self.temperature), key_grad_EBD


def _times(factor: float, tensor: Tensor) -> Tensor:
    """Their product. An operation on a few anchors costs microseconds whatever it does: none for a factor of 1."""
    return tensor if factor == 1 else factor * tensor


def _plus(number: float, tensor: Tensor) -> Tensor:
    """Their sum; no operation for 0."""
    return tensor if number == 0 else number + tensor

"""Value and gradient of the parametric contrastive loss in closed form: no graph is recorded.

For an anchor of total weight W, with denominator exp(lse), weights w_c of the centers, and r its factor in the result::

    L = r (W lse - sum_c w_c z_c - alpha sum_P s_j)
    dL / dz_c = r (W exp(z_c - lse) - w_c)                   Eq. (18) is this times the feature
    dL / ds_j = r (W gamma exp(s_j - lse) - alpha [j in P])

In names `weight` is W, `factor` is r, `push` is r W, and `pull` the two sums of L: L = push lse - factor pull. In
gradients `push` is what a softmax is multiplied by, for that of one part of the denominator (batch or queue) alone
r W exp(lse of the part - lse); and `pull` is the other term: r beta of centers, r alpha of positives.

Queue keys have no gradient, so their sum over j is two [D] vectors: the attention output, and the class sum S_y.

Shapes: E experts (attention heads), B anchors, C classes, O others of the batch (queries, then keys), N keys in the
queue, D dimension, S = C + O.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from paco_ds.contrast.key_queue import QueueSnapshot
from paco_ds.losses.base import gather_label
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

    Kept for backward: the softmax of the scores that are formed, of the centers alone where those are the fewer, and
    the gradients of queries and keys. Nothing depends on the length of the queue.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor | None,
        query: Tensor | None,
        key: Tensor | None,
        labels_B: Tensor,
        queue: QueueSnapshot | None,
        form: Form,
        dtype: torch.dtype,
    ) -> tuple[Tensor | None, ...]:
        ctx.shapes = [None if given is None else given.shape for given in (logits, query, key)]
        # Inside, since a view that carries a gradient costs as much as the work on a few anchors.
        logits_EBC, query_EBD, key_EBD = (
            given[None] if given is not None and given.ndim == 2 else given for given in (logits, query, key)
        )
        formed = _BatchTerm(logits_EBC, query_EBD, key_EBD, labels_B, form, dtype)
        queued = None
        if query_EBD is not None and queue is not None and len(queue):
            queued = _QueueTerm(query_EBD, labels_B, queue, form)
        lses = [part.lse_EB for part in (formed, queued) if part and part.lse_EB is not None]
        if not lses:
            raise ValueError("SupCon got one image, no key and an empty queue: there is nothing to contrast")
        lse_EB = functools.reduce(torch.logaddexp, lses)

        contrast_pull_EB, positives_B = formed.contrast_pull_EB, formed.positives_B
        if contrast_pull_EB is not None and positives_B is not None:
            if queued is not None:
                contrast_pull_EB = contrast_pull_EB + queued.pull_EB
                positives_B = positives_B + queued.count_B
            weight_B, pull_EB = form.alpha * positives_B, form.alpha * contrast_pull_EB
            if formed.center_pull_EB is not None:
                weight_B += form.beta
                pull_EB += _times(form.beta, formed.center_pull_EB)
        else:
            assert formed.center_pull_EB is not None
            weight_B, pull_EB = torch.full_like(lse_EB[0], form.beta), _times(form.beta, formed.center_pull_EB)

        inverse_weight_B = weight_B.reciprocal()
        push_B = torch.full_like(weight_B, 1 / lse_EB.numel())  # r W
        if form.class_weight_C is not None:
            push_B *= form.class_weight_C[labels_B]
        if form.divide_by_weight:
            factor_B = push_B * inverse_weight_B
            if form.beta == 0:
                push_B, factor_B = (t.masked_fill(weight_B == 0, 0.0) for t in (push_B, factor_B))
        else:
            push_B, factor_B = push_B * weight_B, push_B
        loss = torch.addcmul(push_B * lse_EB, factor_B, pull_EB, value=-1).sum()

        softmax_EBC = formed_push_EB = query_grad_EBD = key_grad_EBD = None
        if formed.lse_EB is not None:
            formed_push_EB = (formed.lse_EB - lse_EB).exp_().mul_(push_B)
        if logits_EBC is not None and ctx.needs_input_grad[0]:
            softmax_EBC = formed.softmax_EBC()
        if query_EBD is not None and any(ctx.needs_input_grad[1:3]):
            pull_B1 = (form.alpha * factor_B)[:, None]
            query_grad_EBD, key_grad_EBD = formed.contrast_gradients(
                formed_push_EB, pull_B1, want_keys=ctx.needs_input_grad[2]
            )
            if queued is not None:
                queued_push_EB = (queued.lse_EB - lse_EB).exp_().mul_(push_B)
                query_grad_EBD.addcmul_(pull_B1, queued.class_sum_EBD, value=-1)
                query_grad_EBD.addcmul_(queued_push_EB[..., None], queued.attended_EBD)
            query_grad_EBD /= form.temperature
            if key_grad_EBD is not None:
                key_grad_EBD /= form.temperature
        ctx.form = form
        ctx.set_materialize_grads(False)  # the probabilities' are always None
        center_pull_B = _times(form.beta, factor_B)
        ctx.save_for_backward(softmax_EBC, formed_push_EB, center_pull_B, labels_B, query_grad_EBD, key_grad_EBD)

        center_B = center_optimum_B = positive_B = positive_optimum_B = None
        if formed.own_EB is not None:
            center_B = _mean_of_experts((formed.own_EB - lse_EB).exp_())
            center_optimum_B = form.beta * (1 - form.smoothing) * inverse_weight_B
        if contrast_pull_EB is not None and positives_B is not None:
            # 0 / 0 where there is no positive: nan, as documented.
            positive_EB = (contrast_pull_EB / positives_B).sub_(lse_EB).exp_()
            positive_B = _times(form.gamma, _mean_of_experts(positive_EB))
            positive_optimum_B = (form.alpha * inverse_weight_B).masked_fill_(positives_B == 0, math.nan)
        probabilities = (center_B, center_optimum_B, positive_B, positive_optimum_B)
        ctx.mark_non_differentiable(*(p for p in probabilities if p is not None))
        return loss, *probabilities

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        softmax_EBC, push_EB, pull_B, labels_B, query_grad_EBD, key_grad_EBD = ctx.saved_tensors
        logits_grad_EBC = None
        if softmax_EBC is not None:
            slope = _times(1 / ctx.form.supt, grad)
            push_EB, pull_B = slope * push_EB, slope * pull_B
            logits_grad_EBC = softmax_EBC * push_EB[..., None]
            smoothing, classes = ctx.form.smoothing, softmax_EBC.shape[2]
            if smoothing > 0:
                elsewhere_B = pull_B * (smoothing / (classes - 1))
                logits_grad_EBC -= elsewhere_B[:, None]
                pull_B = pull_B * (1 - smoothing) - elsewhere_B
            own_EB1 = labels_B[:, None].expand(*push_EB.shape, 1)
            logits_grad_EBC.scatter_add_(2, own_EB1, -pull_B[:, None].expand_as(own_EB1))
        needed = ctx.needs_input_grad
        grads = (
            logits_grad_EBC,
            grad * query_grad_EBD if needed[1] else None,
            grad * key_grad_EBD if needed[2] else None,
        )
        shaped = (g if g is None else g.view(shape) for g, shape in zip(grads, ctx.shapes, strict=True))
        return (*shaped, *[None] * 4)


class _BatchTerm:
    """The scores that are formed, side by side as in the denominator of Eq. (4), [E, B, C + O]: z over the centers,
    (logits + log prior) / supt, and s + log gamma over the others of the batch, s = q.k / temperature + b.

    Attributes:
        softmax_EBS, lse_EB: over all of them; None where the anchor meets nothing.
        own_EB: z of the anchor's class; None without centers, as `center_pull_EB`, sum_c w_c z_c / beta.
        contrast_pull_EB: sum over P in the batch of s; None without contrast, as `positives_B`, their number.
    """

    softmax_EBS: Tensor | None = None
    lse_EB: Tensor | None = None
    own_EB: Tensor | None = None
    center_pull_EB: Tensor | None = None
    contrast_pull_EB: Tensor | None = None
    positives_B: Tensor | None = None

    def __init__(
        self,
        logits_EBC: Tensor | None,
        query_EBD: Tensor | None,
        key_EBD: Tensor | None,
        labels_B: Tensor,
        form: Form,
        dtype: torch.dtype,
    ) -> None:
        given = query_EBD if logits_EBC is None else logits_EBC
        assert given is not None
        self.classes = 0 if logits_EBC is None else logits_EBC.shape[2]
        others = 0
        if query_EBD is not None:
            self._query_EBD = query_EBD
            self._others_EOD = query_EBD if key_EBD is None else torch.cat([query_EBD, key_EBD], 1)
            others = self._others_EOD.shape[1]
        score_EBS = given.new_empty(*given.shape[:2], self.classes + others, dtype=dtype)
        if logits_EBC is not None:
            self._centers(score_EBS[..., : self.classes], logits_EBC, labels_B, form)
        if query_EBD is not None:
            self._batch(score_EBS[..., self.classes :], labels_B, form)
        # A batch of one image without a key holds nothing but the anchor itself.
        if self.classes or others > 1:
            # In place: a row is read before it is written, and a tensor of anchors x classes less is taken.
            top_EB = score_EBS.amax(2)
            self.softmax_EBS = torch.softmax(score_EBS, 2, out=score_EBS)
            # The largest probability, at least 1 / (C + O), is exp(top - logsumexp).
            self.lse_EB = top_EB.sub_(self.softmax_EBS.amax(2).log_())

    def _centers(self, z_EBC: Tensor, logits_EBC: Tensor, labels_B: Tensor, form: Form) -> None:
        if form.log_prior_C is None:
            z_EBC.copy_(logits_EBC)
        else:
            torch.add(logits_EBC, form.log_prior_C.to(z_EBC.dtype), out=z_EBC)
        if form.supt != 1:
            z_EBC /= form.supt
        self.own_EB = self.center_pull_EB = gather_label(z_EBC, labels_B)
        if form.smoothing > 0:
            if self.classes < 2:
                raise ValueError("smoothing spreads weight over the other classes, but there is one class")
            others_EB = (z_EBC.sum(2) - self.own_EB) / (self.classes - 1)
            self.center_pull_EB = (1 - form.smoothing) * self.own_EB + form.smoothing * others_EB

    def _batch(self, score_EBO: Tensor, labels_B: Tensor, form: Form) -> None:
        score_EBO.baddbmm_(self._query_EBD, self._others_EOD.mT, beta=0, alpha=1 / form.temperature)
        labels_O = labels_B if score_EBO.shape[2] == len(labels_B) else torch.cat([labels_B, labels_B])
        self._positive_BO = (labels_B[:, None] == labels_O).to(score_EBO.dtype).fill_diagonal_(0)
        if form.contrast_bias_C is not None:
            score_EBO += form.contrast_bias_C[labels_O]
        self.contrast_pull_EB = (score_EBO * self._positive_BO).sum(2)
        self.positives_B = self._positive_BO.sum(1)
        if form.gamma != 1:
            score_EBO += _log(form.gamma)
        score_EBO.diagonal(dim1=1, dim2=2).fill_(-math.inf)

    def softmax_EBC(self) -> Tensor:
        """That of the centers, to be kept: not with the rest of its rows, where that is the most of them."""
        assert self.softmax_EBS is not None
        softmax_EBC = self.softmax_EBS[..., : self.classes]
        return softmax_EBC if 2 * self.classes >= self.softmax_EBS.shape[2] else softmax_EBC.contiguous()

    def contrast_gradients(
        self, push_EB: Tensor | None, pull_B1: Tensor, *, want_keys: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Of queries and, if wanted, of keys, both times the temperature; push = r W exp(lse of this part - lse), None
        if the batch holds nothing, pull = r alpha.

        A query moves as an anchor, and as a contrast of the other anchors: the transposed product.
        """
        size = self._query_EBD.shape[1]
        slope_EBO = (-pull_B1 * self._positive_BO).expand(len(self._query_EBD), -1, -1)
        if push_EB is not None and self.softmax_EBS is not None:
            slope_EBO = torch.addcmul(slope_EBO, push_EB[..., None], self.softmax_EBS[..., self.classes :])
        query_grad_EBD = torch.bmm(slope_EBO, self._others_EOD)
        query_grad_EBD.baddbmm_(slope_EBO[..., :size].mT, self._query_EBD)
        key_grad_EBD = slope_EBO[..., size:].mT @ self._query_EBD if want_keys else None
        return query_grad_EBD, key_grad_EBD


class _QueueTerm:
    """s over the queue, never formed: its attention and class sums.

    Attributes:
        attended_EBD, lse_EB: see `queue_attention`; log gamma is in lse.
        class_sum_EBD, count_B: sum and number of the keys of the anchor's class.
        pull_EB: sum over P in the queue of s.
    """

    def __init__(self, query_EBD: Tensor, labels_B: Tensor, queue: QueueSnapshot, form: Form) -> None:
        queue.check_current()
        dtype = query_EBD.dtype
        keys_END = queue.keys_ND.to(dtype).expand(len(query_EBD), -1, -1)
        bias_C = None if form.contrast_bias_C is None else form.contrast_bias_C.to(dtype)
        bias_N = None if bias_C is None else bias_C[queue.labels_N]
        self.attended_EBD, lse_EB = queue_attention(query_EBD, keys_END, form.temperature, bias_N)
        self.lse_EB = lse_EB if form.gamma == 1 else lse_EB + _log(form.gamma)
        self.class_sum_EBD = queue.class_sums(labels_B).to(dtype)
        self.count_B = queue.class_count_C[labels_B]
        self.pull_EB = (query_EBD * self.class_sum_EBD).sum(2).div_(form.temperature)
        if bias_C is not None:
            self.pull_EB += self.count_B * bias_C[labels_B]


def _times(factor: float, tensor: Tensor) -> Tensor:
    """Their product. An operation on a few anchors costs microseconds whatever it does: none for a factor of 1."""
    return tensor if factor == 1 else factor * tensor


def _mean_of_experts(values_EB: Tensor) -> Tensor:
    return values_EB[0] if len(values_EB) == 1 else values_EB.mean(0)


def _log(gamma: float) -> float:
    """Its logarithm: scores of -inf take no part."""
    return math.log(gamma) if gamma > 0 else -math.inf

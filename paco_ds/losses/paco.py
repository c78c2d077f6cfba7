"""Owns the parametric contrastive loss, in the general form of which PaCo, SupCon, Balanced Softmax and
cross-entropy are settings.

Shapes: B anchors (the query views of a micro-batch), C classes, N keys in the queue, D dimension.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from paco_ds.errors import DataError
from paco_ds.key_queue import QueueSnapshot
from paco_ds.losses.queue_attention import queue_logsumexp


@dataclass(frozen=True)
class LossOutput:
    """A loss and what can be read off it for nothing; all but `loss` is detached.

    Attributes:
        loss: scalar, the mean over anchors.
        center_probability_B: p_c, the share of the anchor's own center in its denominator; None without
            centers, as the next.
        center_optimum_B: what p_c is where the loss is smallest, for exactly this batch and queue (Remark 2).
        positive_probability_B: p+, the geometric mean of the shares of the anchor's positives; None without
            contrast, nan where an anchor has no positive, as the next.
        positive_optimum_B: what p+ is where the loss is smallest (Remarks 1 and 2).
    """

    loss: Tensor
    center_probability_B: Tensor | None
    center_optimum_B: Tensor | None
    positive_probability_B: Tensor | None
    positive_optimum_B: Tensor | None


class ParametricContrastiveLoss(nn.Module):
    """Eq. (4) of "Parametric Contrastive Learning" (ICCV 2021) in its general form.

    Of anchor i, A(i) is the other queries of the micro-batch, with gradient, its keys, and the queue,
    without; P(i) is those of A(i) with its label. With z = (logits + log prior) / supt over the centers
    and s_j = q_i.k_j / temperature over A(i)::

        denominator = sum_c exp(z_c) + gamma sum_A(i) exp(s_j)
        L_i = - sum_c w_c log(exp(z_c) / denominator) - alpha sum_P(i) log(exp(s_j) / denominator)

    where w_c is beta (1 - smoothing) for the anchor's class and beta smoothing / (C - 1) for every other. An
    anchor without any weight (no positive, and beta = 0) contributes 0 to the mean.

    ============================  ========================================================
    PaCo, Eq. (4)                 the defaults; long-tailed recipes give `log_prior_C`
    SupCon, Eq. (3)               `centers=False, beta=0, alpha=1`
    Balanced Softmax              `contrast=False`, with `log_prior_C`
    cross-entropy                 `contrast=False`
    ============================  ========================================================

    Everything is computed in float32 under any autocast, in float64 if an input is float64.

    Args:
        alpha: weight of each positive in P(i).
        temperature: tau of the contrast terms; centers have none.
        beta: weight of the centers; 0 without centers.
        gamma: factor of the contrast terms in the denominator.
        supt: divides the center logits after the prior is added.
        smoothing: share of beta spread over the other classes, in [0, 1).
        normalization: "summed" is Eq. (4); "published", that of the paper's code and its recipes, divides
            each anchor's loss by its sum of weights beta + alpha |P(i)|.
        log_prior_C: log q(y), see :func:`class_prior`. It belongs to training: predictions use plain logits.
        contrast: whether there is an A(i); without it alpha, gamma and temperature have no effect.
        centers: whether there are centers.

    Raises:
        ValueError: a setting out of range, or settings that leave the loss without a term.

    Example:
        >>> loss = ParametricContrastiveLoss(alpha=0.05, temperature=0.2, log_prior_C=class_prior(counts))
        >>> loss(labels, logits, query, key, queue.snapshot(num_classes)).loss.backward()
    """

    log_prior_C: Tensor | None

    def __init__(
        self,
        *,
        alpha: float,
        temperature: float,
        beta: float = 1.0,
        gamma: float = 1.0,
        supt: float = 1.0,
        smoothing: float = 0.0,
        normalization: Literal["published", "summed"] = "published",
        log_prior_C: Tensor | None = None,
        contrast: bool = True,
        centers: bool = True,
    ) -> None:
        super().__init__()
        if min(alpha, beta, gamma) < 0 or not 0 <= smoothing < 1 or min(temperature, supt) <= 0:
            raise ValueError(
                "alpha, beta, gamma must be at least 0, temperature and supt above 0, smoothing in [0, 1): "
                f"{alpha=}, {beta=}, {gamma=}, {temperature=}, {supt=}, {smoothing=}"
            )
        if normalization not in ("published", "summed"):
            raise ValueError(f"normalization is 'published' or 'summed', got {normalization!r}")
        if not centers and (not contrast or beta > 0 or alpha == 0 or gamma == 0):
            raise ValueError(
                "without centers the loss is contrast alone and needs contrast=True, beta=0, alpha > 0 and "
                f"gamma > 0, got {contrast=}, {beta=}, {alpha=}, {gamma=}"
            )
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.temperature, self.supt, self.smoothing = temperature, supt, smoothing
        self.normalization, self.contrast, self.centers = normalization, contrast, centers
        prior_C = None if log_prior_C is None else log_prior_C.float()
        self.register_buffer("log_prior_C", prior_C, persistent=False)

    def forward(
        self,
        labels_B: Tensor,
        center_logits_BC: Tensor | None = None,
        query_BD: Tensor | None = None,
        key_BD: Tensor | None = None,
        queue: QueueSnapshot | None = None,
    ) -> LossOutput:
        """Loss of one micro-batch; inputs of a term that is switched off are not looked at.

        Args:
            labels_B: int64 classes.
            center_logits_BC: outputs of the linear classifier, any floating dtype.
            query_BD: L2-normalised projections of the anchors, not divided by the temperature.
            key_BD: L2-normalised keys of the same images in the same order, or None if there are none. A
                gradient flows into them if they carry one: a key encoder's do not, but those of one encoder
                for both views do.
            queue: keys of the steps before, or None; an empty one takes no part.

        Raises:
            ValueError: an input missing or of the wrong shape, or no contrast at all without centers.
        """
        given = [t for t in (center_logits_BC, query_BD, key_BD) if t is not None]
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in given) else torch.float32
        size = len(labels_B)
        if size == 0:
            raise ValueError("the loss got a micro-batch without images")
        with torch.autocast(labels_B.device.type, enabled=False):
            log_terms: list[Tensor] = []
            pull_B = weight_B = torch.zeros(size, dtype=dtype, device=labels_B.device)
            if self.centers:
                z_BC = self._center_logits(_rows("center_logits_BC", center_logits_BC, size, dtype))
                own_B = z_BC.gather(1, labels_B[:, None])[:, 0]
                log_terms.append(z_BC.logsumexp(1))
                pull_B = pull_B + self.beta * self._smoothed(own_B, z_BC)
                weight_B = weight_B + self.beta
            if self.contrast:
                query_BD = _rows("query_BD", query_BD, size, dtype)
                key_BD = None if key_BD is None else _rows("key_BD", key_BD, size, dtype)
                contrast_terms, similarity_B, positives_B = self._contrast(labels_B, query_BD, key_BD, queue)
                if self.gamma > 0:
                    log_terms += [term_B + math.log(self.gamma) for term_B in contrast_terms]
                pull_B = pull_B + self.alpha * similarity_B
                weight_B = weight_B + self.alpha * positives_B
            if not log_terms:
                raise ValueError("SupCon got one image, no key and an empty queue: there is nothing to contrast")
            lse_B = torch.stack(log_terms).logsumexp(0)
            if self.normalization == "summed":
                loss_B = weight_B * lse_B - pull_B
            else:
                weighted_B = weight_B > 0
                loss_B = torch.where(weighted_B, lse_B - pull_B / weight_B.where(weighted_B, 1.0), 0.0)

            with torch.no_grad():
                center_B = center_optimum_B = positive_B = positive_optimum_B = None
                if self.centers:
                    center_B = (own_B - lse_B).exp()
                    center_optimum_B = self.beta * (1 - self.smoothing) / weight_B
                if self.contrast:
                    # 0 / 0 where there is no positive: nan, as documented.
                    positive_B = self.gamma * (similarity_B / positives_B - lse_B).exp()
                    positive_optimum_B = (self.alpha / weight_B).where(positives_B > 0, math.nan)
        return LossOutput(loss_B.mean(), center_B, center_optimum_B, positive_B, positive_optimum_B)

    def _center_logits(self, logits_BC: Tensor) -> Tensor:
        if self.log_prior_C is not None:
            if logits_BC.shape[1] != len(self.log_prior_C):
                raise ValueError(
                    f"{logits_BC.shape[1]} center logits, but {len(self.log_prior_C)} classes in the prior"
                )
            logits_BC = logits_BC + self.log_prior_C
        return logits_BC / self.supt

    def _smoothed(self, own_B: Tensor, z_BC: Tensor) -> Tensor:
        if self.smoothing == 0:
            return own_B
        if z_BC.shape[1] < 2:
            raise ValueError("smoothing spreads weight over the other classes, but there is one class")
        others_B = (z_BC.sum(1) - own_B) / (z_BC.shape[1] - 1)
        return (1 - self.smoothing) * own_B + self.smoothing * others_B

    def _contrast(
        self, labels_B: Tensor, query_BD: Tensor, key_BD: Tensor | None, queue: QueueSnapshot | None
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Logsumexp over the batch and over the queue, the sum of s over P(i), and |P(i)|, each [B].

        Keeps no tensor of the queue's size for backward: its positives are summed as q.S_y / temperature.
        """
        size, dtype = len(labels_B), query_BD.dtype
        others_OD = query_BD if key_BD is None else torch.cat([query_BD, key_BD])
        other_labels_O = labels_B.repeat(len(others_OD) // size)
        s_BO = query_BD @ others_OD.T / self.temperature
        itself_BO = torch.eye(size, len(others_OD), dtype=torch.bool, device=s_BO.device)
        positive_BO = (labels_B[:, None] == other_labels_O) & ~itself_BO
        similarity_B = s_BO.masked_fill(~positive_BO, 0.0).sum(1)
        positives_B = positive_BO.sum(1).to(dtype)
        terms = []
        if len(others_OD) > 1:
            terms.append(s_BO.masked_fill(itself_BO, -math.inf).logsumexp(1))
        if queue is not None and len(queue.keys_ND):
            terms.append(queue_logsumexp(query_BD, queue.keys_ND, self.temperature))
            class_sum_BD = queue.class_sum_CD[labels_B].to(dtype)
            similarity_B = similarity_B + (query_BD * class_sum_BD).sum(1) / self.temperature
            positives_B = positives_B + queue.class_count_C[labels_B].to(dtype)
        return terms, similarity_B, positives_B


def class_prior(class_counts: Tensor | Sequence[int], class_names: Sequence[str] | None = None) -> Tensor:
    """Return log q(y) [C], float32: the logarithm of each class's share of the training images.

    Args:
        class_counts: training images of each class.
        class_names: their names, for the error.

    Raises:
        DataError: a class without training images, whose prior would be log 0.
    """
    counts_C = torch.as_tensor(class_counts, dtype=torch.float64)
    empty = (counts_C <= 0).nonzero().flatten().tolist()
    if empty or counts_C.numel() == 0:
        named = [f"{c} ({class_names[c]})" if class_names else str(c) for c in empty[:10]]
        raise DataError(
            f"no training images for {len(empty)} of {counts_C.numel()} classes: "
            f"{', '.join(named)}{', ...' if len(empty) > 10 else ''}. The class prior needs one of each at "
            "least: leave these classes out of the data set, or train without the prior"
        )
    return (counts_C / counts_C.sum()).log().float()


def _rows(name: str, tensor: Tensor | None, size: int, dtype: torch.dtype) -> Tensor:
    """A required [B, .] input in the dtype of the computation."""
    if tensor is None:
        raise ValueError(f"this loss needs {name}")
    if tensor.ndim != 2 or len(tensor) != size:
        raise ValueError(f"{name} must have one row for each of {size} labels, got shape {tuple(tensor.shape)}")
    return tensor.to(dtype)

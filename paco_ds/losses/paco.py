"""The parametric contrastive loss in its general form; PaCo, SupCon, Balanced Softmax and cross-entropy are
settings of it.

Shapes: B anchors (the query views of a micro-batch), C classes, N keys in the queue, D dimension, E experts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from paco_ds.config.loss import LossSettings
from paco_ds.config.methods.base import Method
from paco_ds.contrast.key_queue import QueueSnapshot
from paco_ds.losses.base import Anchors, Loss, LossOutput, counts_of_classes, shape_by_expert
from paco_ds.losses.closed_form import ClosedForm, Form


class ParametricContrastiveLoss(Loss):
    """Eq. (4) of "Parametric Contrastive Learning" (ICCV 2021) in its general form.

    Of anchor i, A(i) is the other queries of the micro-batch, with gradient, its keys, and the queue,
    without; P(i) is those of A(i) with its label. With z = (logits + log prior) / supt over the centers
    and s_j = q_i.k_j / temperature + b over A(i), b the bias of k_j's class (0 unless given)::

        denominator = sum_c exp(z_c) + gamma sum_A(i) exp(s_j)
        L_i = - sum_c w_c log(exp(z_c) / denominator) - alpha sum_P(i) log(exp(s_j) / denominator)

    where w_c is beta (1 - smoothing) for the anchor's class and beta smoothing / (C - 1) for every other. An
    anchor without any weight (no positive, and beta = 0) contributes 0 to the mean.

    ==============================  ========================================================
    PaCo, Eq. (4)                   the defaults; long-tailed recipes give `log_prior_C`
    GPaCo                           anchors are both views: give `[q; k]` as queries, labels and logits
                                    likewise, and no keys
    SupCon, Eq. (3)                 `centers=False, beta=0, alpha=1`
    Balanced Softmax                `contrast=False`, with `log_prior_C`
    cross-entropy                   `contrast=False`
    "CE + Balanced Softmax" (T. 13) `contrast_bias_C=log_prior_C`; BCL: minus the log of the classes' counts
    sums of two losses              :class:`paco_ds.losses.multitask.MultiTaskLoss`
    ==============================  ========================================================

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
        contrast_bias_C: b, added to the contrast logits of keys and queries of each class.
        class_weight_C: r_y, a factor of the loss of every anchor of class y, such as
            :func:`paco_ds.losses.base.effective_number_weights`; the mean still divides by B.
        contrast: whether there is an A(i); without it alpha, gamma and temperature have no effect.
        centers: whether there are centers.

    Raises:
        ValueError: a setting out of range, or settings that leave the loss without a term.

    Example:
        >>> loss = ParametricContrastiveLoss(alpha=0.05, temperature=0.2, log_prior_C=class_prior(counts))
        >>> anchors = Anchors(labels, logits, queries, keys, queue.snapshot(num_classes))
        >>> loss(anchors).loss.backward()
    """

    log_prior_C: Tensor | None
    contrast_bias_C: Tensor | None
    class_weight_C: Tensor | None

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
        contrast_bias_C: Tensor | None = None,
        class_weight_C: Tensor | None = None,
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
        by_class = {"log_prior_C": log_prior_C, "contrast_bias_C": contrast_bias_C, "class_weight_C": class_weight_C}
        for name, values_C in by_class.items():
            if values_C is not None and not (values_C.ndim == 1 and values_C.isfinite().all()):
                raise ValueError(f"{name} holds one finite number per class, got shape {tuple(values_C.shape)}")
            self.register_buffer(name, None if values_C is None else values_C.float(), persistent=False)

    def forward(self, anchors: Anchors) -> LossOutput:
        """Loss of one micro-batch; inputs of a term that is switched off are ignored.

        Experts are attention heads: all inputs but the labels may be [E, B, .], the queue too
        (:meth:`QueueSnapshot.experts`), and the loss is the mean over experts.

        Raises:
            ValueError: an input missing or of the wrong shape, no contrast at all without centers, a queue that
                was pushed to since its snapshot.
        """
        labels_B, queue = anchors.labels_B, anchors.queue
        if len(labels_B) == 0:
            raise ValueError("the loss got a micro-batch without images")
        inputs: dict[str, Tensor | None] = {}
        if self.centers:
            inputs["logits"] = _required("center logits", anchors.logits)
        if self.contrast:
            inputs["queries"] = _required("queries", anchors.queries)
            inputs["keys"] = anchors.keys
        given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
        self._check(given, labels_B, queue if self.contrast else None)
        dtype = torch.float64 if any(t.dtype == torch.float64 for t in given.values()) else torch.float32
        query, key = (None if t is None else t.to(dtype) for t in map(given.get, ("queries", "keys")))
        form = Form(
            self.alpha,
            self.beta,
            self.gamma,
            self.temperature,
            self.supt,
            self.smoothing,
            self.normalization == "published",
            self.log_prior_C,
            self.contrast_bias_C,
            self.class_weight_C,
        )
        with torch.autocast(labels_B.device.type, enabled=False):
            # center logits are widened within, where the prior is added
            logits = given.get("logits")
            return LossOutput(*ClosedForm.apply(logits, query, key, labels_B, queue, form, dtype))

    def _check(self, given: Mapping[str, Tensor], labels_B: Tensor, queue: QueueSnapshot | None) -> None:
        """Raise a ValueError where inputs do not fit each other or this loss."""
        shapes = {name: shape_by_expert(name, tensor, len(labels_B)) for name, tensor in given.items()}
        if len({shape[0] for shape in shapes.values()}) > 1:
            raise ValueError(f"all inputs need the same number of experts, got {shapes}")
        if "keys" in given and shapes["keys"] != shapes["queries"]:
            raise ValueError(f"queries and keys need the same shape, got {shapes}")
        if queue is not None:
            keys = (1,) * (3 - queue.keys_ND.ndim) + tuple(queue.keys_ND.shape)
            if keys[::2] != shapes["queries"][::2]:
                raise ValueError(f"queue and queries need the same experts and dimension, got {keys} and {shapes}")
        for name in ("log_prior_C", "contrast_bias_C", "class_weight_C"):
            values_C, logits = getattr(self, name), shapes.get("logits")
            if values_C is not None and logits is not None and logits[2] != len(values_C):
                raise ValueError(f"{logits[2]} center logits, but {len(values_C)} classes in {name}")


def class_prior(class_counts: Tensor | Sequence[int], class_names: Sequence[str] | None = None) -> Tensor:
    """Return log q(y) [C], float32: the logarithm of each class's share of the training images.

    Args:
        class_counts: training images of each class.
        class_names: their names, for the error.

    Raises:
        DataError: a class without training images, whose prior would be log 0.
    """
    counts_C = counts_of_classes(class_counts, class_names, "The class prior", "train without the prior")
    return (counts_C / counts_C.sum()).log().float()


def _required(name: str, tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError(f"this loss needs {name}")
    return tensor


def general_form(shared: LossSettings, **differs: Any) -> ParametricContrastiveLoss:
    """The loss with the settings that a recipe shares between methods, except those given."""
    settings = {
        "alpha": shared.alpha,
        "beta": shared.beta,
        "gamma": shared.gamma,
        "temperature": shared.temperature,
        "supt": shared.supt,
        "smoothing": shared.smoothing,
        "normalization": shared.normalization,
    }
    return ParametricContrastiveLoss(**(settings | differs))


def make_paco(
    settings: Method, shared: LossSettings, class_counts: Sequence[int], class_names: Sequence[str] | None
) -> ParametricContrastiveLoss:
    """PaCo and, with one encoder for both views, GPaCo; without `loss.class_prior` the loss for balanced data."""
    log_prior_C = class_prior(class_counts, class_names) if shared.class_prior else None
    return general_form(shared, log_prior_C=log_prior_C)

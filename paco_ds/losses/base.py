"""The interface of a loss (`Anchors` in, `LossOutput` out) and what several losses share.

Shapes: E experts, B anchors, C classes, D dimension.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from paco_ds.contrast.key_queue import QueueSnapshot
from paco_ds.errors import DataError


@dataclass(frozen=True)
class Anchors:
    """The anchors of a micro-batch and what they are contrasted with. A loss reads what it needs and ignores the rest.

    Of experts everything but labels and routers has a leading dimension E.

    Attributes:
        labels_B: int64 classes.
        logits: center logits [B, C], any floating dtype.
        queries: L2-normalised projections [B, D], not divided by the temperature.
        keys: L2-normalised keys [B, D] of the same images in the same order. A gradient flows into them if they carry
            one.
        queue: keys of earlier steps; an empty one takes no part.
        prototypes: L2-normalised projections of the centers [C, D] (BCL).
        routers: logits of the routers [E - 1, B] (RIDE's second stage).
    """

    labels_B: Tensor
    logits: Tensor | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None
    queue: QueueSnapshot | None = None
    prototypes: Tensor | None = None
    routers: Tensor | None = None


@dataclass(frozen=True)
class LossOutput:
    """A loss and diagnostics at no extra cost; all but `loss` is detached, a mean over experts if any.

    Attributes:
        loss: scalar, the mean over anchors.
        center_probability_B: p_c, the share of the anchor's own center in its denominator; None without centers,
            like the next.
        center_optimum_B: what p_c is where the loss is smallest, for exactly this batch and queue (Remark 2).
        positive_probability_B: p+, the geometric mean of the shares of the anchor's positives; None without
            contrast, nan where an anchor has no positive, like the next.
        positive_optimum_B: what p+ is where the loss is smallest (Remarks 1 and 2).
        parts: terms of the loss and other scalars to log, by the names in `Loss.part_names`.
    """

    loss: Tensor
    center_probability_B: Tensor | None = None
    center_optimum_B: Tensor | None = None
    positive_probability_B: Tensor | None = None
    positive_optimum_B: Tensor | None = None
    parts: Mapping[str, Tensor] = field(default_factory=dict)


class Loss(nn.Module):
    """Base of every loss: `loss(anchors)` gives a `LossOutput`.

    A loss keeps no state between steps. One that changes over training gets the epoch before every step and depends on
    nothing else, so that a resumed run is the same run.

    Attributes:
        part_names: keys of `LossOutput.parts`.
        changes_with_epoch: whether `begin_epoch` has any effect.
    """

    part_names: tuple[str, ...] = ()
    changes_with_epoch = False

    def begin_epoch(self, epoch: int) -> None:
        """The steps that follow are of this epoch, counted from 0."""


def shape_by_expert(name: str, tensor: Tensor, size: int) -> tuple[int, ...]:
    """The shape of a [B, .] or [E, B, .] input, as one of [E, B, .].

    Raises:
        ValueError: not one row for each of `size` labels.
    """
    shape = tuple(tensor.shape)
    if len(shape) not in (2, 3) or shape[-2] != size:
        raise ValueError(f"{name} must have one row for each of {size} labels, got shape {shape}")
    return shape if len(shape) == 3 else (1, *shape)


def rows_by_expert(name: str, tensor: Tensor, size: int) -> Tensor:
    """A [B, .] or [E, B, .] input as [E, B, .].

    Raises:
        ValueError: not one row for each of `size` labels.
    """
    shape_by_expert(name, tensor, size)
    return tensor if tensor.ndim == 3 else tensor[None]


def logits_by_expert(logits: Tensor | None, labels_B: Tensor, classes: int) -> Tensor:
    """Center logits [B, C] or [E, B, C] as [E, B, C], in float32 or, if they are, float64.

    Raises:
        ValueError: none given, no label, or another number of rows or classes.
    """
    if logits is None:
        raise ValueError("this loss needs center logits")
    if len(labels_B) == 0:
        raise ValueError("the loss got a micro-batch without images")
    logits_EBC = rows_by_expert("center logits", logits, len(labels_B))
    if logits_EBC.shape[2] != classes:
        raise ValueError(f"{logits_EBC.shape[2]} center logits, but {classes} classes have counts")
    return logits_EBC if logits_EBC.dtype == torch.float64 else logits_EBC.float()


def gather_label(values_EBC: Tensor, labels_B: Tensor) -> Tensor:
    """[E, B]: of every anchor the value of its class."""
    return values_EBC.gather(2, labels_B[:, None].expand(*values_EBC.shape[:2], 1))[..., 0]


def biased_log_softmax(logits: Tensor | None, labels_B: Tensor, bias_EC: Tensor) -> Tensor:
    """log softmax(z_e + bias_e) [E, B, C] of the logits of experts, in float32 or, if they are, float64.

    Raises:
        ValueError: no logits or images, or another number of experts or classes than biases.
    """
    experts, classes = bias_EC.shape
    if logits is not None and (logits.ndim != 3 or len(logits) != experts):
        raise ValueError(f"logits of {experts} experts [E, B, C] are needed, got {tuple(logits.shape)}")
    return (logits_by_expert(logits, labels_B, classes) + bias_EC[:, None]).log_softmax(2)


def counts_of_classes(
    class_counts: Tensor | Sequence[int], class_names: Sequence[str] | None, what: str, without: str
) -> Tensor:
    """The counts [C] in float64, of classes that all have images.

    Args:
        what: needs them, for the error.
        without: what to do instead, likewise.

    Raises:
        DataError: names the classes without training images.
    """
    counts_C = torch.as_tensor(class_counts, dtype=torch.float64)
    empty = (counts_C <= 0).nonzero().flatten().tolist()
    if empty or counts_C.numel() == 0:
        named = [f"{c} ({class_names[c]})" if class_names else str(c) for c in empty[:10]]
        raise DataError(
            f"no training images for {len(empty)} of {counts_C.numel()} classes: "
            f"{', '.join(named)}{', ...' if len(empty) > 10 else ''}. {what} needs one of each at "
            f"least: leave these classes out of the data set, or {without}"
        )
    return counts_C


def effective_number_weights(class_counts: Tensor | Sequence[int], beta: float = 0.999) -> Tensor:
    """Return r_c = C e_c / sum e with e_c = (1 - beta) / (1 - beta^n_c) [C], float32, of mean 1 (Cui et al. 2019).

    The published multi-task code means these weights, but a slip of shapes makes all of them 1.

    Args:
        class_counts: n_c >= 1, training images of each class.
        beta: in [0, 1): 0 gives equal weights, towards 1 they become proportional to 1 / n_c.

    Raises:
        ValueError: a class without images, or beta out of range.
    """
    counts_C = torch.as_tensor(class_counts, dtype=torch.float64)
    if not (0 <= beta < 1 and counts_C.numel() and counts_C.min() >= 1):
        raise ValueError(f"effective numbers need an image of each class at least and beta in [0, 1), got {beta=}")
    weight_C = (1 - beta) / (1 - beta**counts_C)
    return (len(counts_C) * weight_C / weight_C.sum()).float()

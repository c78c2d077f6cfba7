"""Distillation (Hinton et al. 2015), as RIDE is published with (Wang et al. 2021): a trained run teaches.

With t the teacher's logits and z the student's, of experts their means, T the temperature::

    L = L of the method + weight T^2 mean_i KL( softmax(t / T) || softmax(z / T) )

RIDE's teacher is a RIDE with 6 experts, T 1.5, weight 1. Its code (`RIDELossWithDistill`) adds up all of L, RIDE's own
sum over experts included, once for each expert, with the mean of the experts in the divergence each time: a factor E of
the whole loss, which acts like a larger learning rate and is left out here.

Shapes: E experts, B images, C classes.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from paco_ds.config.loss import DistillSettings
from paco_ds.losses.base import LossOutput

PART = "distillation"


class Distillation:
    """Adds KL to the teacher's logits to the loss of any method that trains centers.

    Args:
        settings: weight and temperature.
        teacher: uint8 images [B, 3, H, W], or mixed ones in float32, to logits [B, C], without gradient.
    """

    def __init__(self, settings: DistillSettings, teacher: Callable[[Tensor], Tensor]) -> None:
        self.settings, self.teacher = settings, teacher

    def __call__(self, output: LossOutput, logits: Tensor, *views: Tensor) -> LossOutput:
        """The method's output with the teacher's term added, and shown among its parts.

        Args:
            logits: the student's [B, C] or, of experts, [E, B, C], of all views one after the other.
            views: the images as the student saw them.
        """
        teacher_BC = torch.cat([self.teacher(images) for images in views])
        term = divergence_from_teacher(logits, teacher_BC, self.settings.temperature)
        parts = {**output.parts, PART: term.detach()}
        return replace(output, loss=output.loss + self.settings.weight * term, parts=parts)


def divergence_from_teacher(logits: Tensor, teacher_BC: Tensor, temperature: float) -> Tensor:
    """T^2 x the mean over images of KL(softmax(t / T) || softmax(z / T)), in float32 or, if z is, float64.

    Raises:
        ValueError: the teacher has other classes or images.
    """
    student_BC = logits.mean(0) if logits.ndim == 3 else logits
    if student_BC.shape != teacher_BC.shape:
        raise ValueError(f"the teacher's logits are {tuple(teacher_BC.shape)}, the student's {tuple(student_BC.shape)}")
    dtype = torch.float64 if student_BC.dtype == torch.float64 else torch.float32
    with torch.autocast(student_BC.device.type, enabled=False):
        log_p_BC = (student_BC.to(dtype) / temperature).log_softmax(1)
        log_t_BC = (teacher_BC.detach().to(dtype) / temperature).log_softmax(1)
        return temperature**2 * (log_t_BC.exp() * (log_t_BC - log_p_BC)).sum(1).mean()

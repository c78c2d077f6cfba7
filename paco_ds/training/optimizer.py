"""The optimizer of a recipe, the usual gradient norm, and the learning rate of each step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from paco_ds.config.optimizer import OptimizerSettings, ScheduleSettings
from paco_ds.models.recogniser import Recogniser
from paco_ds.training.lars_muon import GuardedLars, GuardedMuon
from paco_ds.training.parameter_groups import parameter_groups
from paco_ds.training.skipping_optimizers import GuardedAdamW, GuardedOptimizer, GuardedSGD


class UsualNorm:
    """The geometric mean of the gradient norms of recent steps, with a memory of about 100 of them.

    A geometric mean follows a norm that falls by orders of magnitude in training, and one outlier moves it little. It
    lives on the device, since a step may be skipped for it before the host knows its norm.

    Args:
        log_mean, steps: as `state` of an earlier run gave them.
    """

    MEMORY, FIRST = 100, 20

    def __init__(self, log_mean: float = 0.0, steps: int = 0, device: torch.device | str = "cpu") -> None:
        self._log_mean, self._steps = torch.tensor([log_mean, steps], dtype=torch.float64, device=device)

    def add(self, norm: Tensor, applied: Tensor) -> None:
        """Add the norm of a step, a finite float64 scalar, if the step was applied, a bool one."""
        counted = applied & (norm > 0)
        self._steps += counted
        change = (norm.log() - self._log_mean) / self._steps.clamp(1, self.MEMORY)
        self._log_mean += torch.where(counted, change, 0.0)

    def ratio(self, norm: Tensor) -> Tensor:
        """`norm` over the usual one; nan before 20 steps, when nothing is usual yet."""
        return (norm / self._log_mean.exp()).where(self._steps >= self.FIRST, math.nan)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"log_mean": float(self._log_mean), "steps": int(self._steps)}


def make_optimizer(model: Recogniser, settings: OptimizerSettings, lr: float, *, whole: bool) -> GuardedOptimizer:
    """The optimizer of a recipe for the trained parameters of a model.

    Args:
        lr: peak learning rate.
        whole: nothing is partitioned, so that it knows the gradient norm; needed by those that take no parts.

    Raises:
        RecipeError: see `parameter_groups`.
    """
    assert whole or settings.takes_parts
    groups = parameter_groups(model, settings)
    common: dict[str, Any] = {"params": groups, "lr": lr, "whole": whole, "clip_norm": settings.clip_norm}
    momentum: dict[str, Any] = {"momentum": settings.momentum, "nesterov": settings.nesterov}
    adam: dict[str, Any] = {"betas": settings.betas, "eps": settings.eps}
    if settings.name == "adamw":
        return GuardedAdamW(**common, **adam)
    if settings.name == "lars":
        return GuardedLars(**common, **momentum, trust_coefficient=settings.trust_coefficient)
    if settings.name == "muon":
        return GuardedMuon(**common, **momentum, **adam)
    return GuardedSGD(**common, **momentum)


def learning_rate(schedule: ScheduleSettings, peak: float, step: int, steps_per_epoch: int) -> float:
    """Learning rate of a step, `peak` at most: linear warm-up, then peak / 2 (1 + cos(pi (e - w + 1) / (E - w + 1))),
    or with `minimum_lr` the same from the peak to that.

    With milestones the rate stays after warm-up and becomes a tenth at each of them, in place of the cosine. With
    `warmup_overshoot` the first of them after warm-up has peak (w + 1) / w: dvlab-research's paco_cifar.py says `<=`.
    e counts epochs (as published) or steps, by `schedule.per`; w and E are warm-up and length in the same unit.
    """
    unit = steps_per_epoch if schedule.per == "epoch" else 1
    per_epoch = steps_per_epoch // unit
    now, warmup, length = step // unit, schedule.warmup_epochs * per_epoch, schedule.epochs * per_epoch
    if now < warmup or (schedule.warmup_overshoot and now == warmup > 0):
        return peak * (now + 1) / warmup
    if schedule.milestones:
        return peak * 0.1 ** sum(now >= milestone * per_epoch for milestone in schedule.milestones)
    height = peak - schedule.minimum_lr
    cosine = height / 2 * (1 + math.cos(math.pi * (now - warmup + 1) / (length - warmup + 1)))
    return schedule.minimum_lr + cosine

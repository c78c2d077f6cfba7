"""SGD with a guard that skips a step, the usual gradient norm, and the learning rate as a function of the step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn import Parameter
from torch.nn.utils import get_total_norm

from paco_ds.config.recipe import ScheduleSettings


class UsualNorm:
    """The geometric mean of the gradient norms of recent steps, with a memory of about 100 of them.

    A geometric mean follows a norm that falls by orders of magnitude in training, and one outlier moves it little.

    Args:
        log_mean, steps: as `state` of an earlier run gave them.
    """

    MEMORY, FIRST = 100, 20

    def __init__(self, log_mean: float = 0.0, steps: int = 0) -> None:
        self.log_mean, self.steps = log_mean, steps

    def add(self, norm: float) -> None:
        """Add the norm of a step that was applied."""
        if norm > 0 and math.isfinite(norm):
            self.steps += 1
            self.log_mean += (math.log(norm) - self.log_mean) / min(self.steps, self.MEMORY)

    def ratio(self, norm: float) -> float | None:
        """`norm` over the usual one; None before 20 steps, when nothing is usual yet."""
        if self.steps < self.FIRST or math.isnan(norm):
            return None
        return norm / math.exp(self.log_mean)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"log_mean": self.log_mean, "steps": self.steps}


# Torch wraps both to say that they are not compiled, and loads its compiler for that: 3 s of a core in every rank.
_add_param_group = inspect.unwrap(torch.optim.SGD.add_param_group)
_step = inspect.unwrap(torch.optim.SGD.step)


class GuardedSGD(torch.optim.SGD):
    """SGD with momentum whose `step` does nothing where `guard` says so.

    `step` calls the guard, so that ranks can agree on its answer during backward. Without ZeRO `step` also computes the
    global gradient norm, clips, and skips a norm that is not finite; at stages 1 to 3 DeepSpeed does these three first.

    Attributes:
        guard: whether to skip the step.
        norm_guard: asked once the gradient norm is known: whether to skip the step for it.
        skipped: whether the last step did.
        grad_norm: L2 norm before clipping; None with ZeRO.
    """

    def __init__(
        self, params: Iterable[Parameter], lr: float, *, clip_norm: float | None, whole: bool, **sgd: Any
    ) -> None:
        # one pass over weights, gradients and momentum: a third of the time of torch's loop on CPU
        super().__init__(params, lr, fused=True, **sgd)
        self.clip_norm, self.whole = clip_norm, whole
        self.guard: Callable[[], bool] = lambda: False
        self.norm_guard: Callable[[], bool] = lambda: False
        self.skipped = False
        self.grad_norm: float | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _add_param_group(self, param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self.skipped = self.guard()
        if self.whole and not self.skipped:
            self.grad_norm = self._clip()
            self.skipped = not math.isfinite(self.grad_norm)
        self.skipped = self.skipped or self.norm_guard()
        if not self.skipped:
            _step(self, closure)

    def _clip(self) -> float:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = float(get_total_norm(gradients))
        if self.clip_norm and norm > self.clip_norm:
            torch._foreach_mul_(gradients, self.clip_norm / norm)
        return norm


def learning_rate(schedule: ScheduleSettings, peak: float, step: int, steps_per_epoch: int) -> float:
    """Learning rate of a step, `peak` at most: linear warm-up, then peak / 2 (1 + cos(pi (e - w + 1) / (E - w + 1))).

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
    return peak / 2 * (1 + math.cos(math.pi * (now - warmup + 1) / (length - warmup + 1)))

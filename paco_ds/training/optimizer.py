"""Optimizers with a guard that skips a step, the usual gradient norm, and the learning rate of each step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from paco_ds.config.optimizer import OptimizerSettings, ScheduleSettings
from paco_ds.models.recogniser import Recogniser
from paco_ds.training.parameter_groups import parameter_groups


class UsualNorm:
    """The geometric mean of the gradient norms of recent steps, with a memory of about 100 of them.

    A geometric mean follows a norm that falls by orders of magnitude in training, and one outlier moves it little. It
    lives on the device, since a step may be refused by it before the host knows its norm.

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


class GuardedOptimizer(torch.optim.Optimizer):
    """A fused optimizer of torch whose `step` changes nothing where it is refused, without the host knowing: torch's
    kernels read `found_inf` and `grad_scale` on the device.

    Without ZeRO `step` also computes the global gradient norm, clips, and refuses a norm that is not finite; at stages
    1 to 3 DeepSpeed does these three first, and calls `step` once for each group of parameters.

    Attributes:
        per_weight: names of the states that have the shape of their parameter.
        guard: whether the step may be applied: a bool scalar on the device. Called in `step`, so that ranks can agree
            on it.
        norm_guard: asked once the gradient norm is known, likewise.
        applied: whether the last step was, likewise; None if `step` was not called, or nobody guards it. Set it to None
            before a step that is made in several calls.
        grad_norm: L2 norm before clipping, on the device; None with ZeRO.
    """

    counts_steps: ClassVar[bool]  # whether `step`, the number of applied steps, is a state beside `per_weight`
    _plain_step: ClassVar[Callable[..., Any]]

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        clip_norm: float | None,
        whole: bool,
        **settings: Any,
    ) -> None:
        # one pass over weights, gradients and states: a third of the time of torch's loops on CPU
        make: Any = super().__init__  # of torch's class beside this one
        make(params, lr, fused=True, **settings)
        self.clip_norm, self.whole = clip_norm, whole
        self.guard: Callable[[], Tensor | None] = lambda: None
        self.norm_guard: Callable[[], Tensor | None] = lambda: None
        self.applied: Tensor | None = None
        self.grad_norm: Tensor | None = None

    # Torch wraps this and `step` to say that they are not compiled, and loads its compiler for that: 3 s of a core in
    # every rank.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)

    @property
    def per_weight(self) -> tuple[str, ...]:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if self.whole or self.applied is None:
            self._judge()
        for parameter in self._trained():
            if parameter.grad is not None:
                self.begin(parameter)
        self._plain_step(closure)

    def _judge(self) -> None:
        """Decide on the device whether the step is applied, and how its gradients are clipped."""
        allowed = [self.guard()]
        if self.whole:
            self.grad_norm = get_total_norm([p.grad for p in self._trained() if p.grad is not None])
            allowed.append(self.grad_norm < math.inf)  # nan is not
            if self.clip_norm:
                self.grad_scale = (self.grad_norm / self.clip_norm).clamp_(min=1.0).float()
        allowed.append(self.norm_guard())
        if given := [each for each in allowed if each is not None]:
            self.applied = reduce(torch.logical_and, given)
            self.found_inf = 1 - self.applied.float()

    def begin(self, parameter: Tensor) -> None:
        """Give a parameter without states those before the first step, which are zero: a first step of torch's SGD
        would leave a momentum without a value where it is refused."""
        state = self.state[parameter]
        if not state:
            state.update({name: torch.zeros_like(parameter) for name in self.per_weight})
            if self.counts_steps:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)

    def _trained(self) -> Iterator[Tensor]:
        return (parameter for group in self.param_groups for parameter in group["params"])


class GuardedSGD(GuardedOptimizer, torch.optim.SGD):
    """SGD with momentum."""

    counts_steps = False
    _plain_step = inspect.unwrap(torch.optim.SGD.step)

    @property
    def per_weight(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.defaults["momentum"] else ()


class GuardedAdamW(GuardedOptimizer, torch.optim.AdamW):
    """Adam with decoupled weight decay."""

    counts_steps = True
    _plain_step = inspect.unwrap(torch.optim.AdamW.step)

    @property
    def per_weight(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")


def make_optimizer(model: Recogniser, settings: OptimizerSettings, lr: float, *, whole: bool) -> GuardedOptimizer:
    """The optimizer of a recipe for the trained parameters of a model.

    Args:
        lr: peak learning rate.
        whole: nothing is partitioned, so that it knows the gradient norm.

    Raises:
        RecipeError: see `parameter_groups`.
    """
    groups, clip_norm = parameter_groups(model, settings), settings.clip_norm
    if settings.name == "adamw":
        return GuardedAdamW(groups, lr, clip_norm=clip_norm, whole=whole, betas=settings.betas, eps=settings.eps)
    momentum, nesterov = settings.momentum, settings.nesterov
    return GuardedSGD(groups, lr, clip_norm=clip_norm, whole=whole, momentum=momentum, nesterov=nesterov)


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

"""Torch's fused optimizers with a guard that skips a step, without the host waiting to know."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm


class GuardedOptimizer(torch.optim.Optimizer):
    """A fused optimizer of torch whose `step` changes nothing where it is skipped, without the host knowing: torch's
    kernels read `found_inf` and `grad_scale` on the device.

    Without ZeRO `step` also computes the global gradient norm, clips, and skips where the norm is not finite; at stages
    1 to 3 DeepSpeed does these three first, and calls `step` once for each group of parameters.

    Attributes:
        guard: whether the step may be applied: a bool scalar on the device. Called in `step`, so that ranks can agree
            on it.
        norm_guard: asked once the gradient norm is known, likewise.
        applied: whether the last step was, likewise; None if `step` was not called, or nobody guards it. Set it to None
            before a step that is made in several calls.
        grad_norm: L2 norm before clipping, on the device; None with ZeRO.
    """

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

    def states_of(self, parameter: Tensor) -> tuple[str, ...]:
        """Names of the states that have the shape of this parameter."""
        raise NotImplementedError

    def counts_steps(self, parameter: Tensor) -> bool:
        """Whether `step`, the number of applied steps, is a state of it too."""
        return False

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if self.whole or self.applied is None:
            self._judge()
        for parameter in self._trained():
            if parameter.grad is not None:
                self.begin(parameter)
        self._change_gradients()
        self._plain_step(closure)

    def _change_gradients(self) -> None:
        """Make of the gradients, in place, what torch's step is to take for them."""

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
        would leave a momentum without a value where it is skipped."""
        state = self.state[parameter]
        if not state:
            state.update({name: torch.zeros_like(parameter) for name in self.states_of(parameter)})
            if self.counts_steps(parameter):
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)

    def _clip(self) -> None:
        """Clip the gradients now, which torch's step would do later."""
        if self.clip_norm:
            torch._foreach_div_([p.grad for p in self._trained() if p.grad is not None], self.grad_scale)
            del self.grad_scale

    def _trained(self) -> Iterator[Tensor]:
        return (parameter for group in self.param_groups for parameter in group["params"])


class GuardedSGD(GuardedOptimizer, torch.optim.SGD):
    """SGD with momentum."""

    _plain_step = inspect.unwrap(torch.optim.SGD.step)

    def states_of(self, parameter: Tensor) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.defaults["momentum"] else ()


class GuardedAdamW(GuardedOptimizer, torch.optim.AdamW):
    """Adam with decoupled weight decay."""

    _plain_step = inspect.unwrap(torch.optim.AdamW.step)

    def states_of(self, parameter: Tensor) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def counts_steps(self, parameter: Tensor) -> bool:
        return True

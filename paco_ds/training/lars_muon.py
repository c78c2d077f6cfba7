"""Optimizers that look at whole weights: LARS at their norms, Muon at matrices. Ranks cannot partition what they step.

Both make of each gradient what torch's fused SGD then steps by, since its kernel leaves a skipped step out on the
device; timm's LARS and torch's Muon would need a copy of all weights for that. Tests hold them against these two.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, DEFAULT_NS_STEPS, EPS, _zeropower_via_newtonschulz

from paco_ds.training.parameter_groups import MUON
from paco_ds.training.skipping_optimizers import GuardedAdamW, GuardedSGD

_DECAY = "decay"  # entry of a group of LARS: its weight decay, which torch's SGD must not add once more
_LARS_EPS = 1e-8
_RMS = 0.2  # of AdamW's updates, to which Liu et al. 2025 scale those of Muon


class GuardedLars(GuardedSGD):
    """LARS (You, Gitman and Ginsburg 2017): SGD with momentum, where each weight's gradient and decay are scaled to
    `trust_coefficient` times the weight's norm. Parameters without weight decay are stepped by plain SGD."""

    def __init__(self, params: Any, lr: float, *, trust_coefficient: float, **settings: Any) -> None:
        super().__init__(params, lr, **settings)
        self.trust_coefficient = trust_coefficient
        for group in self.param_groups:
            group[_DECAY], group["weight_decay"] = group["weight_decay"], 0.0

    def _change_gradients(self) -> None:
        self._clip()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not group[_DECAY] or not weights:
                continue
            gradients = [p.grad for p in weights]
            weight, gradient = (torch.stack(torch._foreach_norm(each)) for each in (weights, gradients))
            ratio = self.trust_coefficient * weight / (gradient + group[_DECAY] * weight + _LARS_EPS)
            ratio = ratio.where((weight > 0) & (gradient > 0), 1.0)
            torch._foreach_add_(gradients, weights, alpha=group[_DECAY])
            torch._foreach_mul_(gradients, ratio.unbind())


class GuardedMuon(GuardedAdamW):
    """Muon (Jordan et al. 2024) for the groups marked `MUON`, AdamW for the others, as its authors say.

    The momentum of a matrix is orthogonalised by torch's Newton-Schulz iteration, in bfloat16, and scaled to the size
    of AdamW's updates (Liu et al. 2025), so that one learning rate and one weight decay serve both. The weight of a
    convolution is a matrix with a row for each output channel.
    """

    def __init__(self, params: Any, lr: float, *, momentum: float, nesterov: bool, **settings: Any) -> None:
        super().__init__(params, lr, **settings)
        self.momentum, self.nesterov = momentum, nesterov
        self._matrices = {p for group in self.param_groups if group[MUON] for p in group["params"]}

    def states_of(self, parameter: Tensor) -> tuple[str, ...]:
        return ("momentum_buffer",) if parameter in self._matrices else super().states_of(parameter)

    def counts_steps(self, parameter: Tensor) -> bool:
        return parameter not in self._matrices

    def _change_gradients(self) -> None:
        self._clip()
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not group[MUON] or not weights:
                continue
            updates = []
            for weight in weights:
                updates.append(self._update(weight, weight.grad))
                weight.grad = None  # AdamW's step, which follows, has nothing to do there
            lr, decay, found_inf = group["lr"], group["weight_decay"], getattr(self, "found_inf", None)
            torch._fused_sgd_(
                weights, updates, [], weight_decay=decay, momentum=0.0, lr=lr, dampening=0.0, nesterov=False,
                maximize=False, is_first_step=False, grad_scale=None, found_inf=found_inf,
            )  # fmt: skip

    def _update(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """What the learning rate is multiplied by; moves the momentum on, unless the step is skipped."""
        mean = self.state[weight]["momentum_buffer"]
        if self.applied is not None:
            gradient = gradient.where(self.applied, mean)  # toward itself: no bit of it changes
        mean.lerp_(gradient, 1 - self.momentum)
        matrix = (gradient.lerp(mean, self.momentum) if self.nesterov else mean).flatten(1)
        orthogonal = _zeropower_via_newtonschulz(matrix, (DEFAULT_A, DEFAULT_B, DEFAULT_C), DEFAULT_NS_STEPS, EPS)
        # laid out as the weight is, which torch's fused kernel takes for granted: it may be a transposed matrix
        update = torch.empty_like(weight).copy_(orthogonal.reshape(weight.shape))
        return update.mul_(_RMS * math.sqrt(max(matrix.shape)))

"""A moving average of the trained weights, for evaluations (`evaluation.weights: ema`)."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from paco_ds.distributed.zero import move_average
from paco_ds.models.weight_names import AVERAGE, source_of


def ema_decay(decay: float, step: int) -> float:
    """Share that the average keeps of itself in a step (from 0), min(decay, (1 + step) / (10 + step)), so that a short
    run's average is not that of its beginning (TensorFlow's ExponentialMovingAverage). A function of the step alone, so
    that a resumed run needs no state of it."""
    return min(decay, (1 + step) / (10 + step))


class WeightAverage:
    """Moves `Recogniser.average` at any ZeRO stage, by the code that moves the key encoder; running statistics of
    BatchNorm as well, as timm does.

    Args:
        engine: whose module is a `Recogniser` with an average.
        decay: see `ema_decay`.
    """

    def __init__(self, engine: Any, decay: float) -> None:
        self.engine, self.decay = engine, decay
        weights = dict(engine.module.named_parameters())
        followed = [(p, weights[source_of(n)]) for n, p in weights.items() if n.startswith(AVERAGE)]
        pairs = [(average, source) for average, source in followed if source.requires_grad]  # the others are equal
        self._average, self._source = [average for average, _ in pairs], [source for _, source in pairs]

    def update(self, step: int) -> None:
        """average <- decay average + (1 - decay) weights; once per optimizer step, after it."""
        weight = 1 - ema_decay(self.decay, step)
        move_average(self.engine, self._average, self._source, weight)
        averages, statistics = self._statistics
        if averages:  # torch takes no empty lists
            torch._foreach_lerp_(averages, statistics, weight)
        averages, counters = self._counters
        if averages:
            torch._foreach_copy_(averages, counters)

    @cached_property
    def _statistics(self) -> tuple[list[Tensor], list[Tensor]]:
        return self._buffers(floating=True)

    @cached_property
    def _counters(self) -> tuple[list[Tensor], list[Tensor]]:
        return self._buffers(floating=False)

    def _buffers(self, floating: bool) -> tuple[list[Tensor], list[Tensor]]:
        """(of the average, what they follow). Looked up at the first step: the engine and `RunningStatistics` replace
        buffers before."""
        named = dict(self.engine.module.named_buffers())
        averages = [n for n, b in named.items() if n.startswith(AVERAGE) and b.is_floating_point() == floating]
        return [named[name] for name in averages], [named[source_of(name)] for name in averages]

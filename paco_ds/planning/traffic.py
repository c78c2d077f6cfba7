"""Bytes that a rank sends in an optimizer step, by collective.

Collectives of paco_ds are counted as `Ranks` counts them, to the byte. Those of DeepSpeed, gradients among them, follow
from the stage; a ring is assumed: all_reduce sends 2 (W-1)/W of the tensor, reduce_scatter and all_gather (W-1)/W.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from paco_ds.contrast.key_exchange import key_exchange
from paco_ds.distributed.ranks import MicroBatchLayout
from paco_ds.planning.planned_rank import FLOAT, PlannedRank
from paco_ds.planning.trace import StepTrace
from paco_ds.randomness import DrawPurpose, permutation
from paco_ds.training.totals import StepTotals


@dataclass(frozen=True)
class Traffic:
    """One collective of a step.

    Attributes:
        what: the content.
        op: the collective.
        bytes: sent by this rank in a step.
        by: "paco_ds", whose counters show exactly this number, or "DeepSpeed".
    """

    what: str
    op: str
    bytes: int
    by: str


def plan_traffic(rank: PlannedRank, zero: Any, step: int = 0) -> list[Traffic]:
    """All collectives of global step `step` on rank `rank.layout.rank`; none on one rank.

    The number of images that a rank sends depends on the permutation of the step; on average (W-1)/W of its images.
    """
    if rank.layout.world_size == 1:
        return []
    return [*_own(rank, step), *_deepspeed(rank.trace, rank.layout, zero)]


def _own(rank: PlannedRank, step: int) -> list[Traffic]:
    recipe, trace, layout = rank.recipe, rank.trace, rank.layout
    W, m, A = layout.world_size, layout.micro_batch, layout.accumulation
    rows = []
    if rank.exchanges_images:
        slots = permutation(layout.global_batch, DrawPurpose.KEY_GROUPS, recipe.seed, step)
        exchange = key_exchange(slots.reshape(layout.micro_batches, m), layout)
        leaving = int(np.sum(exchange.send)) - exchange.send[layout.rank]
        rows.append(Traffic("key images", "all_to_all", leaving * rank.image_bytes, "paco_ds"))
    if recipe.keys_from:
        packed = FLOAT * (A * m * (recipe.model.key_dim + 1) + 1)  # keys, labels, a finite flag
        rows.append(Traffic("keys and labels", "all_gather", packed * (W - 1), "paco_ds"))
    totals = StepTotals(torch.empty(0), ("",) * trace.loss_parts).vector.nbytes
    rows.append(Traffic("loss, flags, probabilities", "all_reduce", _ring(2 * totals, W), "paco_ds"))
    if trace.statistics:
        rows.append(Traffic("running statistics", "all_reduce", _ring(2 * FLOAT * trace.statistics, W), "paco_ds"))
    return rows


def _deepspeed(trace: StepTrace, layout: MicroBatchLayout, zero: Any) -> list[Traffic]:
    W, A = layout.world_size, layout.accumulation
    trained = FLOAT * sum(trace.trained)
    if zero.stage < 3:
        # stage 2 reduces every micro-batch, stages 0 and 1 once a step
        times = A if zero.stage == 2 else 1
        gradients = Traffic("gradients", "all_reduce", times * _ring(2 * trained, W), "DeepSpeed")
        if zero.stage == 0:
            return [gradients]
        own = FLOAT * 2 * -(-sum(trace.trained) // (2 * W))
        return [gradients, Traffic("updated weights", "all_gather", own * (W - 1), "DeepSpeed")]
    # DeepSpeed gathers for every forward and backward, whatever the persistence threshold, and once more where its
    # trace of the modules does not hold, which three kinds of forward in a step see to; less if it keeps some
    query, key = (sum(-(-n // W) for n in each) * FLOAT * (W - 1) for each in (trace.trained, trace.followed))
    return [
        Traffic("gradients", "reduce_scatter", A * query, "DeepSpeed"),
        Traffic("key weights, at most", "all_gather", (A + 1) * key, "DeepSpeed"),
        Traffic("query weights, at most", "all_gather", (2 * A + 1) * query, "DeepSpeed"),
    ]


def _ring(both_ways: int, world_size: int) -> int:
    return both_ways * (world_size - 1) // world_size

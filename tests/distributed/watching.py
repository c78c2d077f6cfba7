"""What the ranks of a pool run in the tests of p_c and p+, and what these are by definition, in float64."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from paco_ds.config.recipe import Recipe
from paco_ds.distributed.ranks import ByteCounter, Ranks
from paco_ds.losses.base import Anchors, LossOutput
from paco_ds.training.step_result import StepResult
from tests.distributed.runs import CLASS_COUNTS, SHOTS, deepspeed_config, made_micro_batch, make_step
from tests.recipes import tiny_recipe

FIGURES = (
    "center_probability",
    "center_probability_optimum",
    "positive_probability",
    "positive_probability_optimum",
)
ByShot = dict[str, dict[str, float | None]]


@dataclass
class LossInputs:
    """What the loss of one micro-batch was given: the contrasts A(i) are the queries, then keys and queue."""

    labels: Tensor
    logits: Tensor
    query: Tensor
    others: Tensor
    other_labels: Tensor


@dataclass
class WatchedStep:
    """A step's result, the inputs of this rank's losses, and the collectives that summed over ranks."""

    result: StepResult
    inputs: list[LossInputs]
    sums: int


def watched_steps(ranks: Ranks, steps: int, overrides: tuple[str, ...] = (), keys: bool = True) -> list[WatchedStep]:
    """Steps of the tiny recipe; with `keys` off, queries meet each other alone and many have no positive."""
    recipe = tiny_recipe(*overrides)
    step = make_step(ranks, recipe, deepspeed_config(1, autocast=False))
    loss, inputs, sums = step.forward.loss, [], []

    def listening(anchors: Anchors) -> LossOutput:
        if not keys:
            anchors = replace(anchors, keys=None, queue=None)
        labels, queries, queue = anchors.labels_B, anchors.queries, anchors.queue
        if queries is not None:
            others, other_labels = [queries], [labels]
            if anchors.keys is not None:
                others += [anchors.keys, queue.keys_ND]
                other_labels += [labels, queue.labels_N]
            made = (labels, anchors.logits, queries, torch.cat(others), torch.cat(other_labels))
            inputs.append(LossInputs(*(tensor.detach().clone() for tensor in made)))
        return loss(anchors)

    step.forward.loss = listening
    ranks.on_bytes = lambda op, count: sums.append(op) if op == "all_reduce" else None
    seen = []
    for number in range(steps):
        inputs.clear()
        sums.clear()
        batches = [made_micro_batch(recipe, number, j) for j in step.layout.own]
        result = step(number, batches, recipe.lr)
        seen.append(WatchedStep(result, list(inputs), len(sums)))
    ranks.on_bytes = ByteCounter()
    step.engine.destroy()
    return seen


def plain_means(recipe: Recipe, inputs: list[LossInputs]) -> ByShot:
    """Softmax over everything, anchor by anchor; means over the anchors of each shot that have the figure."""
    alpha, tau = recipe.loss.alpha, recipe.loss.temperature
    log_prior = torch.log(torch.tensor(CLASS_COUNTS, dtype=torch.float64) / sum(CLASS_COUNTS))
    values: dict[str, dict[str, list[float]]] = {figure: defaultdict(list) for figure in FIGURES}
    for batch in inputs:
        for i, label in enumerate(batch.labels.tolist()):
            kept = torch.arange(len(batch.others)) != i
            s = batch.others[kept].double() @ batch.query[i].double() / tau
            p = torch.cat([batch.logits[i].double() + log_prior, s]).softmax(0)
            positive = p[len(CLASS_COUNTS) :][batch.other_labels[kept] == label]
            weight = 1 + alpha * len(positive)
            found = {"center_probability": float(p[label]), "center_probability_optimum": 1 / weight}
            if len(positive):
                found["positive_probability"] = float(positive.log().mean().exp())
                found["positive_probability_optimum"] = alpha / weight
            for figure, value in found.items():
                values[figure][SHOTS[label]].append(value)
    return {
        figure: {shot: sum(v) / len(v) if (v := of_shot[shot]) else None for shot in ("many", "medium", "few")}
        for figure, of_shot in values.items()
    }

"""What an optimizer step means, in plain torch on one process: every number of ranks must give this.

Written apart from paco_ds.step: no DeepSpeed, no collectives, the loss as a loop over anchors.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paco_ds.data.stream import MicroBatch
from paco_ds.models.recogniser import Recogniser, make_recogniser
from paco_ds.randomness import Stream, permutation
from paco_ds.recipe import Recipe
from tests.distributed.runs import CLASS_COUNTS, NORMALIZATION, Outcome, made_micro_batch


def plain_steps(recipe: Recipe, steps: int, lr: float) -> Outcome:
    """The recipe's first `steps` steps on made images."""
    model = make_recogniser(recipe, len(CLASS_COUNTS), *NORMALIZATION)
    before = copy.deepcopy(model.state_dict())
    trained = [p for p in model.parameters() if p.requires_grad]
    velocity = [torch.zeros_like(p) for p in trained]
    norms = [m for m in model.query_encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    queue_keys, queue_labels = torch.empty(0, recipe.model.projection_dim), torch.empty(0, dtype=torch.long)
    losses = []
    for step in range(steps):
        batches = [made_micro_batch(recipe, step, j) for j in range(recipe.step.micro_batches)]
        _follow(model, recipe.key_encoder.momentum)
        keys = _keys(model, recipe, batches, step)
        labels = torch.cat([b.labels for b in batches])
        statistics = [(n.running_mean.clone(), n.running_var.clone()) for n in norms]
        sums = [(torch.zeros_like(mean), torch.zeros_like(var)) for mean, var in statistics]
        model.zero_grad()
        step_loss = 0.0
        for j, batch in enumerate(batches):
            for norm, (mean, var) in zip(norms, statistics, strict=True):
                norm.running_mean.copy_(mean)
                norm.running_var.copy_(var)
            logits, query = model(batch.query)
            own = keys[j * len(query) : (j + 1) * len(query)]
            loss = _loss(recipe, batch.labels, logits, query, own, queue_keys, queue_labels) / len(batches)
            loss.backward()
            step_loss += loss.item()
            for norm, (mean, var) in zip(norms, sums, strict=True):
                mean += norm.running_mean / len(batches)
                var += norm.running_var / len(batches)
        for norm, (mean, var) in zip(norms, sums, strict=True):
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)
            norm.num_batches_tracked.fill_(step + 1)
        _sgd(trained, velocity, recipe, lr)
        queue_keys = torch.cat([queue_keys, keys])[-recipe.queue.length :]
        queue_labels = torch.cat([queue_labels, labels])[-recipe.queue.length :]
        losses.append(step_loss)
    return Outcome(losses, before, copy.deepcopy(model.state_dict()), {}, {})


def _follow(model: Recogniser, momentum: float) -> None:
    queries = dict(model.query_encoder.named_parameters())
    with torch.no_grad():
        for name, key in model.key_encoder.named_parameters():
            key.copy_(momentum * key + (1 - momentum) * queries[name])


def _keys(model: Recogniser, recipe: Recipe, batches: list[MicroBatch], step: int) -> Tensor:
    views = torch.cat([b.key for b in batches])
    lanes = np.arange(len(views))
    if recipe.key_encoder.batch_norm == "shuffle":
        lanes = permutation(len(lanes), Stream.KEY_GROUPS, recipe.seed, step)
    keys = torch.empty(len(views), recipe.model.projection_dim)
    for group in lanes.reshape(recipe.step.micro_batches, -1):
        keys[group] = model(views[group], keys=True)
    return keys


def _loss(
    recipe: Recipe,
    labels: Tensor,
    logits: Tensor,
    query: Tensor,
    own: Tensor,
    queue: Tensor,
    queue_labels: Tensor,
) -> Tensor:
    """Eq. (4), normalised as published, anchor by anchor."""
    settings = recipe.loss
    z = logits + torch.log(torch.tensor(CLASS_COUNTS) / sum(CLASS_COUNTS))
    total = torch.zeros(())
    for i, label in enumerate(labels):
        others = torch.arange(len(labels)) != i
        rows = torch.cat([query[others], own, queue])
        same = torch.cat([labels[others], labels, queue_labels]) == label
        s = rows @ query[i] / settings.temperature
        log_p = F.log_softmax(torch.cat([z[i], s]), 0)
        weights = torch.cat([F.one_hot(label, len(z[i])).float(), settings.alpha * same.float()])
        total = total - (weights * log_p).sum() / weights.sum()
    return total / len(labels)


def _sgd(parameters: list[nn.Parameter], velocity: list[Tensor], recipe: Recipe, lr: float) -> None:
    settings = recipe.optimizer
    norm = torch.sqrt(sum((p.grad**2).sum() for p in parameters))
    clip = min(1.0, settings.clip_norm / norm.item()) if settings.clip_norm else 1.0
    with torch.no_grad():
        for parameter, v in zip(parameters, velocity, strict=True):
            v.mul_(settings.momentum).add_(clip * parameter.grad + settings.weight_decay * parameter)
            parameter.sub_(lr * v)

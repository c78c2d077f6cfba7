"""What an optimizer step means, in plain torch on one process: every number of ranks must give this.

Independent of paco_ds.training.step: no DeepSpeed, no collectives, the loss as a loop over anchors. PaCo, GPaCo, BCL
with one encoder and no queue.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paco_ds.config.methods.bcl import BclSettings
from paco_ds.config.recipe import Recipe
from paco_ds.data.stream.batches import MicroBatch
from paco_ds.models.recogniser import Recogniser
from paco_ds.randomness import DrawPurpose, permutation
from tests.distributed.runs import CLASS_COUNTS, NORMALIZATION, Outcome, made_micro_batch
from tests.recipes import model_of


def plain_steps(
    recipe: Recipe,
    steps: int,
    lr: float,
    state: dict[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    group_of: Callable[[str, Tensor], tuple[float, float]] | None = None,
    is_matrix: Callable[[str, Tensor], bool] = lambda name, parameter: False,
) -> Outcome:
    """The recipe's first `steps` steps on made images, from its initial weights or those of `state`.

    Encoders compute in `dtype`; what they hand over, and the loss, is float32.

    Args:
        group_of: (factor of the learning rate, weight decay) of a parameter by its name; by default (1, the recipe's).
        is_matrix: whether Muon steps a parameter.
    """
    model = model_of(recipe, len(CLASS_COUNTS), *NORMALIZATION)
    if state:
        model.load_state_dict(state)
    model.to(dtype)
    before = copy.deepcopy(model.state_dict())
    trained = [p for p in model.parameters() if p.requires_grad]
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        group_of(*pair) if group_of else (1.0, recipe.optimizer.weight_decay)
        for pair in zip(names, trained, strict=True)
    ]
    velocity, squares = ([torch.zeros_like(p) for p in trained] for _ in range(2))
    norms: list[Any] = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    ]
    queue_keys, queue_labels = torch.empty(0, recipe.model.key_dim), torch.empty(0, dtype=torch.long)
    losses = []
    for step in range(steps):
        batches = [made_micro_batch(recipe, step, j) for j in range(recipe.step.micro_batches)]
        keys = None
        if recipe.key_encoder is not None:
            _follow(model, recipe.key_encoder.momentum)
            keys = _keys(model, recipe, batches, step)
        second_rows = []
        labels = torch.cat([b.labels for b in batches])
        statistics = [(n.running_mean.clone(), n.running_var.clone()) for n in norms]
        sums = [(torch.zeros_like(mean), torch.zeros_like(var)) for mean, var in statistics]
        model.zero_grad()
        step_loss = 0.0
        for j, batch in enumerate(batches):
            for norm, (mean, var) in zip(norms, statistics, strict=True):
                norm.running_mean.copy_(mean)
                norm.running_var.copy_(var)
            if model.prototypes is not None:
                assert batch.key is not None
                prototypes = F.normalize(model.prototypes(model.centers.weight), dim=1)
                views = (*_logits_and_rows(model, batch.query), *_logits_and_rows(model, batch.key))
                loss = _bcl(recipe, batch.labels, *views, prototypes)
            elif keys is None:
                _, logits, query, *_ = model(batch.query)
                _, second_logits, own, *_ = model(batch.key)
                second_rows.append(_beside(own.detach()))
                loss = _loss_of_both_views(
                    recipe, batch.labels, logits, second_logits, query, own, queue_keys, queue_labels
                )
            elif recipe.loss.contrast_scope == "global_batch":
                _, logits, query, *_ = model(batch.query)
                loss = _loss(recipe, batch.labels, logits, query, keys, labels, queue_keys, queue_labels)
            else:
                _, logits, query, *_ = model(batch.query)
                own = keys[j * len(batch.labels) : (j + 1) * len(batch.labels)]
                loss = _loss(recipe, batch.labels, logits, query, own, batch.labels, queue_keys, queue_labels)
            loss = loss / len(batches)
            loss.backward()
            step_loss += loss.item()
            for norm, (mean, var) in zip(norms, sums, strict=True):
                mean += norm.running_mean / len(batches)
                var += norm.running_var / len(batches)
        for norm, (mean, var) in zip(norms, sums, strict=True):
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)
            norm.num_batches_tracked.fill_(step + 1)
        _clip(trained, recipe.optimizer.clip_norm)
        by_muon = [is_matrix(*pair) for pair in zip(names, trained, strict=True)]
        every = list(zip(trained, velocity, squares, groups, by_muon, strict=True))
        for parameter, v, square, group, matrix in every:
            assert parameter.grad is not None
            given = parameter, parameter.grad, v
            if recipe.optimizer.name == "sgd":
                _sgd(*given, recipe, lr)
            elif recipe.optimizer.name == "lars":
                _lars(*given, group[1], recipe, lr)
            elif matrix:
                _muon(*given, group[1], recipe, lr)
            else:
                _adamw(*given, square, group, recipe, lr, step + 1)
        if recipe.queue.length:
            keys = torch.cat(second_rows) if keys is None else keys
            queue_keys = torch.cat([queue_keys, keys])[-recipe.queue.length :]
            queue_labels = torch.cat([queue_labels, labels])[-recipe.queue.length :]
        losses.append(step_loss)
    states = {}
    for name, (_, v, square, _, matrix) in zip(names, every, strict=True):
        if recipe.optimizer.name in ("sgd", "lars") or matrix:
            states[f"momentum_buffer.{name}"] = v
        else:
            states |= {f"exp_avg.{name}": v, f"exp_avg_sq.{name}": square, "step": torch.tensor(float(steps))}
    return Outcome(losses, before, copy.deepcopy(model.state_dict()), states, {})


def _follow(model: Recogniser, momentum: float) -> None:
    queries = dict(model.query_encoder.named_parameters())
    with torch.no_grad():
        for name, key in model.key_encoder.named_parameters():
            key.copy_(momentum * key + (1 - momentum) * queries[name])


def _keys(model: Recogniser, recipe: Recipe, batches: list[MicroBatch], step: int) -> Tensor:
    views = torch.cat([b.key for b in batches if b.key is not None])
    slots = np.arange(len(views))
    if recipe.key_encoder.batch_norm == "shuffle":
        block = recipe.key_encoder.shuffle_block
        if block is None:
            slots = permutation(len(slots), DrawPurpose.KEY_GROUPS, recipe.seed, step)
        else:
            firsts = range(0, len(slots), size := block * recipe.step.micro_batch)
            within = (permutation(size, DrawPurpose.KEY_GROUPS, recipe.seed, step, first) for first in firsts)
            slots = np.concatenate([first + order for first, order in zip(firsts, within, strict=True)])
    keys = torch.empty(len(views), recipe.model.key_dim)
    for group in slots.reshape(recipe.step.micro_batches, -1):
        keys[group] = model(views[group], keys=True)
    return keys


def _loss(
    recipe: Recipe,
    labels: Tensor,
    logits: Tensor,
    query: Tensor,
    keys: Tensor,
    key_labels: Tensor,
    queue: Tensor,
    queue_labels: Tensor,
) -> Tensor:
    """Eq. (4), normalised as published, anchor by anchor; of experts the mean of their losses."""
    if logits.ndim == 3:
        parts = zip(logits, query, keys.chunk(len(logits), 1), queue.chunk(len(logits), 1), strict=True)
        of_each = [_loss(recipe, labels, z, q, k, key_labels, rows, queue_labels) for z, q, k, rows in parts]
        return torch.stack(of_each).mean()
    total = torch.zeros(())
    for i, label in enumerate(labels):
        others = torch.arange(len(labels)) != i
        rows = torch.cat([query[others], keys, queue])
        same = torch.cat([labels[others], key_labels, queue_labels]) == label
        total = total + _anchor_loss(recipe, label, logits[i], query[i], rows, same)
    return total / len(labels)


def _loss_of_both_views(
    recipe: Recipe,
    labels: Tensor,
    first_logits: Tensor,
    second_logits: Tensor,
    first: Tensor,
    second: Tensor,
    queue: Tensor,
    queue_labels: Tensor,
) -> Tensor:
    """GPaCo: the 2 m rows of both views are anchors in turn, the 2 m - 1 others and the queue what each meets."""
    if first_logits.ndim == 3:
        parts = zip(first_logits, second_logits, first, second, queue.chunk(len(first), 1), strict=True)
        of_each = [_loss_of_both_views(recipe, labels, *part, queue_labels) for part in parts]
        return torch.stack(of_each).mean()
    total, m = torch.zeros(()), len(labels)
    for logits, view, other_view in ((first_logits, first, second), (second_logits, second, first)):
        for i, label in enumerate(labels):
            others = torch.arange(m) != i
            rows = torch.cat([view[others], other_view, queue])
            same = torch.cat([labels[others], labels, queue_labels]) == label
            total = total + _anchor_loss(recipe, label, logits[i], view[i], rows, same)
    return total / (2 * m)


def _logits_and_rows(model: Recogniser, images: Tensor) -> tuple[Tensor, Tensor]:
    """Of a view alone: prototypes are made of the centers once for both."""
    feature, row = model.query_encoder(model.normalize(images))
    return model.centers(feature), row


def _bcl(
    recipe: Recipe,
    labels: Tensor,
    first_logits: Tensor,
    first: Tensor,
    second_logits: Tensor,
    second: Tensor,
    prototypes: Tensor,
) -> Tensor:
    """Zhu et al. 2022, anchor by anchor: the logit-adjusted softmax and, of every class, the mean of
    exp over its rows, of which its prototype is one."""
    logits, rows = torch.cat([first_logits, second_logits]), torch.cat([first, second, prototypes])
    labels = labels.repeat(2)
    of_row = torch.cat([labels, torch.arange(len(prototypes))])
    log_prior = torch.log(torch.tensor(CLASS_COUNTS) / sum(CLASS_COUNTS))
    softmax = contrast = torch.zeros(())
    for i, label in enumerate(labels):
        softmax = softmax - F.log_softmax(logits[i] + log_prior, 0)[label]
        other = torch.arange(len(rows)) != i
        scores = rows @ rows[i] / recipe.loss.temperature
        means = [scores[other & (of_row == c)].exp().mean() for c in range(len(prototypes))]
        contrast = contrast - (scores[other & (of_row == label)] - torch.stack(means).sum().log()).mean()
    settings = recipe.method
    assert isinstance(settings, BclSettings)
    return (settings.softmax_weight * softmax + settings.contrast_weight * contrast) / len(labels)


def _beside(rows: Tensor) -> Tensor:
    """Rows of experts beside each other, as the queue keeps them."""
    return rows if rows.ndim == 2 else torch.cat(list(rows), 1)


def _anchor_loss(recipe: Recipe, label: Tensor, logits: Tensor, anchor: Tensor, rows: Tensor, same: Tensor) -> Tensor:
    settings = recipe.loss
    z = logits + torch.log(torch.tensor(CLASS_COUNTS) / sum(CLASS_COUNTS))
    log_p = F.log_softmax(torch.cat([z, rows @ anchor / settings.temperature]), 0)
    weights = torch.cat([F.one_hot(label, len(z)).float(), settings.alpha * same.float()])
    return -(weights * log_p).sum() / weights.sum()


def _clip(parameters: list[nn.Parameter], clip_norm: float | None) -> None:
    if clip_norm is None:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.stack([(gradient**2).sum() for gradient in gradients]).sum().sqrt()
    for gradient in gradients:
        gradient.mul_(min(1.0, clip_norm / norm.item()))


@torch.no_grad()
def _adamw(
    p: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    group: tuple[float, float],
    recipe: Recipe,
    lr: float,
    number: int,
) -> None:
    """Loshchilov and Hutter 2019, Algorithm 2, step `number` from 1."""
    one, two = recipe.optimizer.betas
    factor, decay = group
    m.mul_(one).add_((1 - one) * gradient)
    v.mul_(two).add_((1 - two) * gradient**2)
    update = (m / (1 - one**number)) / ((v / (1 - two**number)).sqrt() + recipe.optimizer.eps)
    p.sub_(lr * factor * (update + decay * p))


@torch.no_grad()
def _sgd(parameter: Tensor, gradient: Tensor, v: Tensor, recipe: Recipe, lr: float) -> None:
    settings = recipe.optimizer
    v.mul_(settings.momentum).add_(gradient + settings.weight_decay * parameter)
    parameter.sub_(lr * v)


@torch.no_grad()
def _lars(parameter: Tensor, gradient: Tensor, v: Tensor, decay: float, recipe: Recipe, lr: float) -> None:
    """You et al. 2017, Algorithm 1, with the learning rate outside the momentum as in later code."""
    length, slope = parameter.norm(), gradient.norm()
    local = 1.0
    if decay and length > 0 and slope > 0:
        local = recipe.optimizer.trust_coefficient * length / (slope + decay * length)
    v.mul_(recipe.optimizer.momentum).add_(local * (gradient + decay * parameter))
    parameter.sub_(lr * v)


@torch.no_grad()
def _muon(parameter: Tensor, gradient: Tensor, v: Tensor, decay: float, recipe: Recipe, lr: float) -> None:
    """Jordan et al. 2024, with the size of updates of Liu et al. 2025."""
    mu = recipe.optimizer.momentum
    v.mul_(mu).add_((1 - mu) * gradient)
    matrix = ((1 - mu) * gradient + mu * v).reshape(len(v), -1)
    x = matrix.bfloat16() / matrix.bfloat16().norm()
    x = x if len(x) <= x.shape[1] else x.T
    for _ in range(5):  # each line is rounded to bfloat16 once
        a = (x.float() @ x.T.float()).bfloat16().float()
        b = (-4.7750 * a + 2.0315 * (a @ a)).bfloat16().float()
        x = (3.4445 * x.float() + b @ x.float()).bfloat16()
    x = x if x.shape == matrix.shape else x.T
    update = 0.2 * max(matrix.shape) ** 0.5 * x.float().reshape(v.shape)
    parameter.sub_(lr * (update + decay * parameter))

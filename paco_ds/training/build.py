"""The only assembly of a recipe's stream, model, engine, loss, keys and queue: for training, plans, benches, tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from paco_ds.config.recipe import Recipe
from paco_ds.contrast.contrast import Contrast
from paco_ds.contrast.key_encoder import KeyEncoder, groups_of_keys, key_momentum
from paco_ds.contrast.key_queue import KeyQueue
from paco_ds.data.manifest import Manifest
from paco_ds.data.stream.batches import RenderOn, TrainingStream
from paco_ds.distributed.ranks import MicroBatchLayout, Ranks
from paco_ds.errors import RecipeError
from paco_ds.losses import make_loss
from paco_ds.losses.distillation import Distillation
from paco_ds.models.execution import Hardware, choose
from paco_ds.models.recogniser import Recogniser, make_recogniser
from paco_ds.training.engine import autocast_of, initialise
from paco_ds.training.forward import Forward
from paco_ds.training.gradients import GradientMean
from paco_ds.training.initial_weights import freeze
from paco_ds.training.mixup import CutMix, Mixup
from paco_ds.training.step import Step
from paco_ds.training.weight_average import WeightAverage


@dataclass(frozen=True)
class Classes:
    """The classes of a training split.

    Attributes:
        counts: training images of each class.
        shots: "many", "medium" or "few" of each class.
        names: for messages; None without a manifest.
        mean, std: of the channels, in the 0-1 range.
    """

    counts: Sequence[int]
    shots: Sequence[str]
    names: Sequence[str] | None = None
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    std: Sequence[float] = (0.25, 0.25, 0.25)

    @classmethod
    def of(cls, manifest: Manifest, train_split: str) -> Classes:
        """Those of a split of shards."""
        counts, shots = manifest.split(train_split).class_counts, manifest.shots_of_classes(train_split)
        return cls(counts, shots, manifest.classes, manifest.mean, manifest.std)


def build_stream(
    recipe: Recipe,
    manifest: Manifest,
    layout: MicroBatchLayout,
    start: int = 0,
    device: torch.device | None = None,
) -> TrainingStream:
    """The training images of a recipe, from global step `start` on. Loader processes start here.

    Args:
        device: of this rank, which makes the views if the recipe says so; the CPU by default.
    """
    render_on = None
    if recipe.views.device == "accelerator":
        render_on = RenderOn(device or torch.device("cpu"), recipe.views.query.size)
    return TrainingStream(
        recipe.data,
        recipe.training_views,
        manifest,
        layout,
        seed=recipe.seed,
        epochs=recipe.schedule.epochs,
        start=start,
        render_on=render_on,
    )


def build_model(recipe: Recipe, classes: Classes) -> Recogniser:
    """The model of a recipe, with weights drawn from its seed, frozen where `model.trained` says so, and the average
    that `evaluation.weights: ema` needs.

    Raises:
        RecipeError: an unknown backbone, or one that does not fit the recipe.
    """
    model = make_recogniser(recipe, len(classes.counts), classes.mean, classes.std)
    freeze(model, recipe.model)
    if recipe.step.micro_batch < 2 and any(isinstance(m, _BatchNorm) and m.training for m in model.modules()):
        raise RecipeError("step.micro_batch is 1: BatchNorm needs at least 2 images; raise it")
    if recipe.evaluation.weights == "ema":
        model.begin_average()
    return model


def build_step(
    recipe: Recipe,
    model: Recogniser,
    classes: Classes,
    config: Mapping[str, Any],
    ranks: Ranks,
    *,
    total_steps: int,
    steps_per_epoch: int,
    teacher: Callable[[Tensor], Tensor] | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Step:
    """An optimizer step of a recipe: DeepSpeed engine, optimizer, loss, key encoder and queue. All ranks call it.

    Args:
        model: with its initial weights, which DeepSpeed copies.
        config: of DeepSpeed, see `read_deepspeed_config`.
        total_steps, steps_per_epoch: of the run.
        teacher: images to logits, required with `loss.distill`.

    Raises:
        DataError: a class without training images, of a method that needs one.
        RecipeError: settings that do not fit each other or this number of ranks.
    """
    layout = MicroBatchLayout(recipe.step.micro_batch, recipe.step.micro_batches, ranks.rank, ranks.world_size)
    execution = choose(recipe.engine, Hardware.of(ranks.device), autocast_of(config))
    groups: Literal["shuffle", "local"] | None = None
    if recipe.key_encoder is not None and model.key_encoder is not None:
        groups = groups_of_keys(recipe.key_encoder, model.key_encoder)
    engine, optimizer = initialise(model, recipe.optimizer, recipe.lr, execution, config, layout)
    loss = make_loss(recipe.loss, classes.counts, classes.names).to(ranks.device)
    distill = recipe.loss.distill
    distillation = Distillation(distill, teacher) if distill and teacher else None
    contrast = None
    if recipe.keys_from is not None:
        queue = KeyQueue(recipe.queue.length, recipe.model.key_dim, ranks.device)
        settings, key_encoder = recipe.key_encoder, None
        if settings is not None and groups is not None:
            key_encoder = KeyEncoder(
                engine,
                layout,
                ranks,
                momentum=lambda step: key_momentum(settings, step, total_steps, recipe.step.scale),
                batch_norm=groups,
                shuffle_block=settings.shuffle_block,
                seed=recipe.seed,
            )
        contrast = Contrast(queue, key_encoder, recipe.loss.contrast_scope, len(classes.counts), recipe.model.experts)
    mixup: Mixup | CutMix | None = Mixup(recipe.step.mixup, recipe.seed) if recipe.step.mixup else None
    if recipe.step.cutmix:
        mixup = CutMix(recipe.step.cutmix, recipe.seed, recipe.views.query.size)
    return Step(
        engine,
        optimizer,
        Forward(engine, loss, two_views=recipe.runs_both_views, distillation=distillation),
        layout,
        ranks,
        classes.shots,
        contrast,
        seed=recipe.seed,
        stop_requested=stop_requested,
        steps_per_epoch=steps_per_epoch,
        mixup=mixup,
        max_grad_norm_ratio=recipe.engine.max_grad_norm_ratio,
        average=WeightAverage(engine, recipe.evaluation.ema_decay) if model.average is not None else None,
        gradients=GradientMean(
            [p for p in model.parameters() if p.requires_grad], ranks, getattr(torch, execution.gradients)
        )
        if optimizer.whole
        else None,
    )

"""Evaluation: every image of a split exactly once at any number of ranks, class counts added up, never logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from paco_ds.checkpoint import Checkpoint
from paco_ds.config.recipe import Recipe
from paco_ds.data.manifest import Manifest, TrainedData
from paco_ds.data.stream.load import Replaced
from paco_ds.distributed.ranks import Ranks
from paco_ds.evaluation.accuracy import ClassCounts, ShotAccuracy, shot_accuracy
from paco_ds.evaluation.mistakes import mistakes
from paco_ds.evaluation.predictions import Recorder, detail
from paco_ds.evaluation.split import EvaluationSplit
from paco_ds.models.output import ModelOutput
from paco_ds.models.recogniser import Recogniser, make_recogniser


class EvaluationLeftError(Exception):
    """An evaluation was left before its end, by all ranks after the same batch."""


@torch.no_grad()
def evaluate(
    model: Callable[[Tensor], ModelOutput],
    module: nn.Module,
    split: EvaluationSplit,
    ranks: Ranks,
    experts: int | None = None,
    leave: Callable[[], bool] = lambda: False,
) -> ShotAccuracy:
    """Accuracy of `model` (a DeepSpeed engine or the module itself) on a split; with routers the experts used too.

    Every rank runs equally many forwards (uneven ones hang ZeRO-3); padding is masked out.

    Args:
        experts: how many the model has, for the counts by experts used.
        leave: asked before each batch whether to leave, the same on all ranks.

    Raises:
        EvaluationLeftError: `leave` said so.
    """
    counts, recorder = ClassCounts.zeros(len(split.shots), ranks.device), Recorder()
    bad: list[Replaced] = []
    by_experts_E: Tensor | None = None  # images on which 1, 2, ... experts ran
    was_training = module.training
    module.eval()
    for batch in split.batches(ranks):
        if leave():
            raise EvaluationLeftError
        output = model(batch.query.to(ranks.device))
        logits, used = output.mean_logits(), output.experts_used
        labels, valid = batch.labels.to(ranks.device), batch.valid.to(ranks.device)
        counts.add(logits, labels, valid)
        recorder.add(logits, labels, batch.ids.to(ranks.device), valid)
        bad += batch.replaced
        if used is not None:
            found_E = torch.bincount(used[valid] - 1, minlength=experts or 1)
            by_experts_E = found_E if by_experts_E is None else by_experts_E + found_E
    module.train(was_training)
    left_out = split.left_out(bad, ranks)
    total = ClassCounts.from_tensor(ranks.sum(counts.as_tensor()))
    predictions = recorder.gather(ranks)
    figures = detail(predictions, split.class_counts)
    wrong = mistakes(predictions, figures.confusions, split.class_counts, split.shots)
    by_experts = None if by_experts_E is None else ranks.sum(by_experts_E).tolist()
    accuracy = shot_accuracy(total, split.shots)
    return replace(accuracy, detail=figures, mistakes=wrong, images_by_experts=by_experts, left_out=left_out)


def load_recogniser(checkpoint: Checkpoint, recipe: Recipe, data: Manifest | TrainedData) -> Recogniser:
    """The model of a recipe with the weights of a checkpoint that `evaluation.weights` says, on the CPU.

    Raises:
        CheckpointError: they are not in the checkpoint.
    """
    weights = recipe.evaluation.weights
    model = make_recogniser(recipe, len(data.classes), data.mean, data.std)
    if weights == "ema":
        model.begin_average()
    checkpoint.load_into(model)
    model.use(weights)
    if weights != "query":
        model.key_encoder = model.average = None
    return model


class Ensemble(nn.Module):
    """Models of one data set as one: the mean of their probabilities, each model's being those of its experts' mean
    logits. A single model gives its own mean logits and the number of experts that its routers asked.

    Args:
        members: (model, whether it runs under bfloat16 autocast, as it was trained).
    """

    def __init__(self, members: Sequence[tuple[Recogniser, bool]]) -> None:
        super().__init__()
        self.models = nn.ModuleList(model for model, _ in members)
        self.autocast = [autocast for _, autocast in members]

    def forward(self, images: Tensor) -> ModelOutput:
        of_each = []
        for model, autocast in zip(self.models, self.autocast, strict=True):
            with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
                output = model(images)
            of_each.append(output.mean_logits())
        if len(of_each) == 1:
            return ModelOutput(None, of_each[0], experts_used=output.experts_used)
        return ModelOutput(None, torch.stack([logits.softmax(1) for logits in of_each]).mean(0).log())

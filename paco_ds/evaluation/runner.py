"""Evaluation: every image of a split exactly once at any number of ranks, class counts added up, never logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from paco_ds.data.manifest import Manifest
from paco_ds.data.stream import evaluation_stream
from paco_ds.distributed import Ranks
from paco_ds.evaluation.accuracy import ClassCounts, ShotAccuracy, shot_accuracy
from paco_ds.recipe import Recipe


@torch.no_grad()
def evaluate(
    model: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    module: nn.Module,
    recipe: Recipe,
    manifest: Manifest,
    split: str,
    ranks: Ranks,
) -> ShotAccuracy:
    """Accuracy of `model` (a DeepSpeed engine or the module itself) on a split.

    Every rank runs equally many forwards (uneven ones hang ZeRO-3); padding is masked out.
    """
    counts = ClassCounts.zeros(len(manifest.classes), ranks.device)
    was_training = module.training
    module.eval()
    for batch in evaluation_stream(recipe, manifest, split, ranks.rank, ranks.world_size):
        logits, _ = model(batch.query.to(ranks.device))
        if logits.ndim == 3:  # of experts, whose mean is the model's answer
            logits = logits.mean(0)
        counts.add(logits, batch.labels.to(ranks.device), batch.valid.to(ranks.device))
    module.train(was_training)
    total = ClassCounts.from_tensor(ranks.sum(counts.as_tensor()))
    return shot_accuracy(total, _shots(manifest, recipe))


def _shots(manifest: Manifest, recipe: Recipe) -> Sequence[str]:
    return manifest.shots_of_classes(recipe.data.train_split)

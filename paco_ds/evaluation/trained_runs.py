"""Trained runs as paco-evaluate takes them: their models, the images to evaluate them on, and what its options do to a
model that was trained.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from paco_ds.checkpoint import Checkpoint, chosen_checkpoint
from paco_ds.command import say
from paco_ds.config.data import DataSettings
from paco_ds.config.recipe import Recipe
from paco_ds.config.views import EvalView
from paco_ds.data.manifest import Manifest, open_data
from paco_ds.distributed.ranks import Ranks
from paco_ds.errors import RecipeError
from paco_ds.evaluation.aggregation import AS_IT_IS, Aggregated, accuracy_of_weights, equal_weights, learn_weights
from paco_ds.evaluation.choose_tau import choose_tau
from paco_ds.evaluation.logit_adjustment import LogitAdjusted
from paco_ds.evaluation.runner import Ensemble, load_recogniser
from paco_ds.evaluation.split import EvaluationSplit, class_index
from paco_ds.evaluation.tau_normalization import logits_of_taus, tau_normalized
from paco_ds.evaluation.temperature import checkpoint_digest, fit_on_split, save_temperature, validation_split
from paco_ds.models.recogniser import Recogniser

Member = tuple[Recogniser, bool]
"""A model, and whether it runs under bfloat16 autocast, as it was trained."""


@dataclass(frozen=True)
class RunImages:
    """The images that runs are evaluated on.

    Attributes:
        recipe: of the first run.
        manifest: of the shards that it was trained on.
        split: name of the split.
        other: the shards of --data, whose split it is then.
    """

    recipe: Recipe
    manifest: Manifest
    split: str
    other: Manifest | None

    @property
    def evaluated(self) -> EvaluationSplit:
        """The split that is evaluated."""
        return replace(self.of_run(self.split), images=self.other)

    def of_run(self, split: str) -> EvaluationSplit:
        """A split of the run's own shards."""
        recipe = self.recipe
        return EvaluationSplit(self.manifest, split, recipe.data, recipe.views.evaluation, recipe.evaluation)


def other_shards(shards: str, settings: DataSettings, split: str, trained: Manifest) -> Manifest:
    """The manifest of other shards with this split, all of whose classes were trained.

    Raises:
        DataError: there are no such shards, or a class is not the run's.
    """
    other = open_data(settings.model_copy(update={"shards": shards, "classes": None}), [split])
    class_index(other, trained)
    return other


def load_members(
    runs: Sequence[Path], recipes: Sequence[Recipe], manifest: Manifest
) -> tuple[list[Member], list[Checkpoint]]:
    """(model of each run, on the CPU, and whether it runs under autocast; the checkpoint of each).

    Raises:
        RecipeError: the runs' views of evaluations differ.
        CheckpointError: a run has no weights, or those of other shards.
    """
    for run, recipe in zip(runs, recipes, strict=True):
        _require_same_view(runs[0], recipes[0].views.evaluation, run, recipe.views.evaluation)
    members, checkpoints = [], []
    for run, recipe in zip(runs, recipes, strict=True):
        checkpoint = chosen_checkpoint(run, recipe.evaluation.checkpoint)
        checkpoint.check_data(manifest.sha256, "and give another test set of the same classes with --data")
        members.append((load_recogniser(checkpoint, recipe, manifest), checkpoint.state["autocast"]))
        checkpoints.append(checkpoint)
    return members, checkpoints


def _require_same_view(first: Path, its_view: EvalView, run: Path, view: EvalView) -> None:
    """An image is decoded once for all members of an ensemble."""
    for name, there in its_view:
        if there != (here := getattr(view, name)):
            raise RecipeError(
                f"views.evaluation.{name} is {there!r} in {first} and {here!r} in {run}, and an ensemble shows all its "
                f"runs the same views: give --set views.evaluation.{name}=VALUE if the runs may share one, or leave "
                f"one out"
            )


def about(runs: Sequence[Path], images: RunImages) -> dict[str, Any]:
    """What metrics.json says of what is evaluated on what."""
    about: dict[str, Any] = {"ensemble": [str(run) for run in runs]} if len(runs) > 1 else {}
    about["weights"] = images.recipe.evaluation.weights
    if len(runs) == 1 and (execution := _execution_of(runs[0])) is not None:
        about["execution"] = execution
    if images.other is not None:
        about["data"] = {"manifest_sha256": images.other.sha256, "classes": len(images.other.classes)}
    return about


def _execution_of(run: Path) -> Any:
    """How the training was computed, of its metrics.json; None without one."""
    with suppress(OSError, ValueError, AttributeError):  # a damaged file is replaced, not read
        return json.loads((run / "metrics.json").read_text(encoding="utf-8")).get("execution")
    return None


def with_normalized_centers(
    tau: str, model: Recogniser, autocast: bool, images: RunImages, ranks: Ranks
) -> tuple[list[Member], float]:
    """(the only member, with normalised centers; the tau of --tau-normalize)."""
    model = model.to(ranks.device)
    chosen = _tau_of("--tau-normalize", tau, images, partial(choose_tau, model, logits_of_taus(model)), ranks)
    return [(tau_normalized(model, chosen), autocast)], chosen


def with_adjusted_logits(tau: str, model: nn.Module, images: RunImages, ranks: Ranks) -> tuple[nn.Module, float]:
    """(the model with adjusted logits; the tau of --logit-adjust)."""
    adjusted = LogitAdjusted(model, images.of_run(images.split).class_counts, 0.0).to(ranks.device)
    choose = partial(choose_tau, adjusted, adjusted.logits_of_taus())
    adjusted.tau = _tau_of("--logit-adjust", tau, images, choose, ranks)
    return adjusted, adjusted.tau


def _tau_of(
    option: str,
    tau: str,
    images: RunImages,
    choose: Callable[[EvaluationSplit, Ranks], tuple[float, dict[float, float]]],
    ranks: Ranks,
) -> float:
    """The tau of an option; `auto` chooses it on the validation split."""
    if tau != "auto":
        return float(tau)
    settings = images.recipe.evaluation
    split = settings.split
    if split is None:
        raise RecipeError(f"{option} auto chooses tau on evaluation.split, which is null: give a number instead")
    if split == settings.test_split:
        raise RecipeError(
            f"{option} auto would choose tau on {split}, the test split: give a number, or shards with a "
            f"validation split (paco-build-shards build ... --validation-share .05)"
        )
    validation = images.of_run(split)
    validation.manifest.check_files(split)
    chosen, balanced = choose(validation, ranks)
    if ranks.first:
        say(f"tau {chosen}: balanced accuracy on {split} " + ", ".join(f"{t}: {a:.3f}" for t, a in balanced.items()))
    return chosen


def fit_temperature(run: Path, checkpoint: Checkpoint, model: Ensemble, images: RunImages, ranks: Ranks) -> None:
    """Fit a temperature on the validation split and store it in the run, for the weights of the model's checkpoint."""
    settings = images.recipe.evaluation
    split = images.of_run(validation_split(settings))
    split.manifest.check_files(split.name)
    fitted = fit_on_split(model, split, ranks, checkpoint_digest(checkpoint, settings.weights))
    if ranks.first:
        path = save_temperature(run, fitted)
        nll = f"NLL of {split.name} {fitted.nll_before:.4f} -> {fitted.nll_after:.4f}"
        say(f"written: {path}: temperature {fitted.temperature:.4f}, {nll}")


def with_weighed_experts(
    model: Recogniser, autocast: bool, images: RunImages, ranks: Ranks
) -> tuple[Aggregated, dict[str, Tensor]]:
    """(the model, its experts weighed for the split as it is; weights learned on it, by test distribution)."""
    recipe = images.recipe
    aggregated = Aggregated(model, autocast, equal_weights(recipe.model)).to(ranks.device)
    weights = learn_weights(aggregated, images.evaluated, recipe.views.key, ranks, recipe.optimizer, recipe.seed)
    aggregated.weights_E.copy_(weights[AS_IT_IS])
    if ranks.first:
        shown = ", ".join(f"{weight:.2f}" for weight in weights[AS_IT_IS].tolist())
        say(f"weights of the experts, learned on {images.split} without labels: {shown}")
    return aggregated, weights


def about_aggregation(
    model: Aggregated, weights: Mapping[str, Tensor], images: RunImages, ranks: Ranks
) -> dict[str, Any]:
    """What metrics.json says of weighed experts, with the expected accuracy on each test distribution. A collective."""
    return {
        "aggregation": "prediction stability",
        "test_agnostic": accuracy_of_weights(model, weights, images.evaluated, ranks),
        "expert_weights": {name: of_each.tolist() for name, of_each in weights.items()},
    }

"""What the ranks of a pool run in the tests of evaluation: the newest checkpoint of a run, on a split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from paco_ds.checkpoint import newest_checkpoint
from paco_ds.config.load import load_recipe
from paco_ds.config.recipe import Recipe
from paco_ds.data.manifest import Manifest, open_data
from paco_ds.distributed.ranks import Ranks
from paco_ds.evaluation.aggregation import Aggregated, equal_weights, learn_weights
from paco_ds.evaluation.choose_tau import choose_tau
from paco_ds.evaluation.logit_adjustment import LogitAdjusted
from paco_ds.evaluation.results import write_results
from paco_ds.evaluation.runner import Ensemble, evaluate, load_recogniser
from paco_ds.evaluation.split import EvaluationSplit
from paco_ds.evaluation.tau_normalization import logits_of_taus, tau_normalized
from paco_ds.models.recogniser import Recogniser
from paco_ds.training.build import Classes, build_model
from paco_ds.training.initial_centers import class_means


def written(
    ranks: Ranks,
    run: Path,
    output: Path,
    overrides: tuple[str, ...] = (),
    split: str = "test",
    tau: float | None = None,
    adjusted: float | None = None,
) -> dict[str, Any] | None:
    """What the first rank writes, as evaluate.py does; with `tau` of normalised centers, or of adjusted logits."""
    recipe, manifest, model = _loaded(run, split, overrides)
    if tau is not None:
        model = tau_normalized(model, tau)
    ensemble: Any = Ensemble([(model, False)])
    if adjusted is not None:
        ensemble = LogitAdjusted(ensemble, _judged(recipe, manifest, split).class_counts, adjusted)
    accuracy = evaluate(ensemble, ensemble, _judged(recipe, manifest, split), ranks, recipe.model.experts)
    if not ranks.first:
        return None
    return write_results(
        output,
        accuracy,
        _judged(recipe, manifest, split),
        run=recipe.name,
        seed=recipe.seed,
        scale=recipe.step.scale,
        step=0,
        world_size=ranks.world_size,
        started="",
    )


def scores_of_taus(ranks: Ranks, run: Path, split: str) -> tuple[float, dict[float, float]]:
    """What `choose_tau` says on this rank."""
    recipe, manifest, model = _loaded(run, split)
    return choose_tau(model, logits_of_taus(model), _judged(recipe, manifest, split), ranks)


def weights_of_experts(ranks: Ranks, run: Path, split: str) -> dict[str, list[float]]:
    """What evaluate.py --aggregate-experts learns on this rank, by test distribution."""
    recipe, manifest, model = _loaded(run, split)
    aggregated = Aggregated(model, False, equal_weights(recipe.model))
    judged = _judged(recipe, manifest, split)
    learned = learn_weights(aggregated, judged, recipe.views.key, ranks, recipe.optimizer, recipe.seed)
    return {name: weights_E.tolist() for name, weights_E in learned.items()}


def _judged(recipe: Recipe, manifest: Manifest, split: str) -> EvaluationSplit:
    return EvaluationSplit(manifest, split, recipe.data, recipe.views.evaluation, recipe.evaluation)


def _loaded(run: Path, split: str, overrides: tuple[str, ...] = ()) -> tuple[Recipe, Manifest, Recogniser]:
    recipe = load_recipe(run / "recipe.yaml", overrides)
    manifest = open_data(recipe.data, [split])
    return recipe, manifest, load_recogniser(newest_checkpoint(run), recipe, manifest)


def means(ranks: Ranks, recipe: Path) -> Tensor:
    """Class means of a fresh model over the training split, as a run begins with them."""
    settings = load_recipe(recipe)
    manifest = open_data(settings.data, [settings.data.train_split])
    model = build_model(settings, Classes.of(manifest, settings.data.train_split))
    return class_means(model, _judged(settings, manifest, settings.data.train_split), ranks)

"""Evaluate a run, on one rank or, by the launcher, on many.

examples:
  paco-evaluate --run runs/demo
  deepspeed --module paco_ds.evaluate --run runs/demo
  paco-evaluate --run runs/demo --data data/another-test-set

Prints Many / Medium / Few / All, top-1 and top-5, and writes RUN/metrics.json. Reads the portable checkpoint; no
DeepSpeed engine is needed, and every image is counted once on any number of ranks. Several --run are an ensemble:
their probabilities are averaged. --data takes the images from other shards of the same classes, or of some of them;
shots are still those of the run.
"""

from __future__ import annotations

import argparse
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` hears Ctrl-C: no traceback of an import
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # a checkout need not be installed

from paco_ds.command import Screen, one_line_on_interrupt, report_user_errors, say
from paco_ds.config.load import load_recipe
from paco_ds.config.plugins import AllowCode

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from paco_ds.config.data import DataSettings
    from paco_ds.config.recipe import EvaluationSettings
    from paco_ds.data.manifest import Manifest
    from paco_ds.distributed.ranks import Ranks
    from paco_ds.evaluation.runner import Ensemble
    from paco_ds.evaluation.split import EvaluationSplit


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if len(arguments.run) > 1 and arguments.output is None:
        parser.error("an ensemble belongs to no run: say with --output FILE.json where its figures go")
    if len(arguments.run) > 1 and arguments.tau_normalize is not None:
        parser.error("--tau-normalize is of one run")
    corrected = arguments.tau_normalize is not None or arguments.logit_adjust is not None
    if arguments.aggregate_experts and (len(arguments.run) > 1 or corrected or arguments.fit_temperature):
        parser.error("--aggregate-experts is of one run as it was trained")
    if arguments.fit_temperature and (len(arguments.run) > 1 or corrected or arguments.data):
        parser.error("--fit-temperature is of one run as it was trained")
    with one_line_on_interrupt():
        return _evaluate(arguments)


def _evaluate(arguments: argparse.Namespace) -> int:
    with report_user_errors():  # mistakes in settings are reported before torch is loaded
        recipes = [load_recipe(run / "recipe.yaml", arguments.set) for run in arguments.run]
    # not at the top: loader processes read this file again, and need none of it
    from paco_ds.checkpoint import chosen_checkpoint
    from paco_ds.data.manifest import open_data
    from paco_ds.distributed.launch import join_job, leave_job
    from paco_ds.distributed.watchdog import RankWatchdog
    from paco_ds.evaluation import tau_normalization
    from paco_ds.evaluation.aggregation import (
        AS_IT_IS,
        Aggregated,
        accuracy_of_weights,
        equal_weights,
        learn_weights,
    )
    from paco_ds.evaluation.choose_tau import choose_tau
    from paco_ds.evaluation.logit_adjustment import LogitAdjusted
    from paco_ds.evaluation.results import now, write_results
    from paco_ds.evaluation.runner import Ensemble, evaluate, load_recogniser
    from paco_ds.evaluation.split import EvaluationSplit

    with report_user_errors(), RankWatchdog():
        started = now()
        runs = arguments.run
        recipe = recipes[0]
        split = arguments.split or recipe.evaluation.test_split
        manifest = open_data(recipe.data, [] if arguments.data else [split])
        other = _other_shards(arguments.data, recipe.data, split, manifest) if arguments.data else None

        def judged(split: str, images: Manifest | None = None) -> EvaluationSplit:
            return EvaluationSplit(manifest, split, recipe.data, recipe.views.evaluation, recipe.evaluation, images)

        members, steps = [], []
        for run, its_recipe in zip(runs, recipes, strict=True):
            checkpoint = chosen_checkpoint(run, its_recipe.evaluation.checkpoint)
            checkpoint.check_data(manifest.sha256, "and give another test set of the same classes with --data")
            members.append((load_recogniser(checkpoint, its_recipe, manifest), checkpoint.state["autocast"]))
            steps.append(checkpoint.step)
        ranks = join_job(recipe.engine.threads)
        about: dict[str, Any] = {"ensemble": [str(run) for run in runs]} if len(runs) > 1 else {}
        about |= {"weights": recipe.evaluation.weights}
        if other is not None:
            about |= {"data": {"manifest_sha256": other.sha256, "classes": len(other.classes)}}
        if arguments.tau_normalize is not None:
            network = members[0][0].to(ranks.device)
            choose = partial(choose_tau, network, tau_normalization.logits_of_taus(network))
            tau = _tau_of("--tau-normalize", arguments.tau_normalize, recipe.evaluation, judged, choose, ranks)
            members = [(tau_normalization.tau_normalized(network, tau), members[0][1])]
            about |= {"tau_normalization": tau}
        ensemble = Ensemble(members).to(ranks.device)
        if arguments.fit_temperature:
            _fit_temperature(runs[0], ensemble, recipe.evaluation, judged, ranks)
        model: nn.Module = ensemble
        if arguments.logit_adjust is not None:
            model = adjusted = LogitAdjusted(model, judged(split).class_counts, 0.0).to(ranks.device)
            choose = partial(choose_tau, adjusted, adjusted.logits_of_taus())
            tau = _tau_of("--logit-adjust", arguments.logit_adjust, recipe.evaluation, judged, choose, ranks)
            adjusted.tau = about["logit_adjustment"] = tau
        weights: dict[str, Tensor] = {}
        if arguments.aggregate_experts:
            model = aggregated = Aggregated(*members[0], equal_weights(recipe.model)).to(ranks.device)
            its_images, view = judged(split, other), recipe.views.key
            weights = learn_weights(aggregated, its_images, view, ranks, recipe.optimizer, recipe.seed)
            aggregated.weights_E.copy_(weights[AS_IT_IS])
            if ranks.first:
                shown = ", ".join(f"{weight:.2f}" for weight in weights[AS_IT_IS].tolist())
                say(f"weights of the experts, learned on {split} without labels: {shown}")
        accuracy = evaluate(model, model, judged(split, other), ranks, experts=recipe.model.experts)
        if weights:
            by_distribution = accuracy_of_weights(aggregated, weights, its_images, ranks)
            about |= {"aggregation": "prediction stability", "test_agnostic": by_distribution}
            about |= {"expert_weights": {name: of_each.tolist() for name, of_each in weights.items()}}
        if ranks.first:
            if other is not None and len(other.classes) < (classes := len(manifest.classes)):
                of_all = f"{len(other.classes)} of the {classes} classes"
                say(f"{arguments.data} has {of_all}; predictions are among all of them")
            what = f"{recipe.name}, step {steps[0]}" if len(runs) == 1 else f"ensemble of {len(runs)} runs"
            Screen().print(accuracy.table(f"{what}, on {split}"))
            own = split == recipe.evaluation.test_split and other is None
            judged_on = Path(arguments.data.partition("?")[0]).name if other else split  # a query may hold a secret
            name = "metrics.json" if own else f"metrics-{judged_on}.json"
            target = arguments.output or runs[0] / name
            write_results(
                target,
                accuracy,
                judged(split, other),
                run=recipe.name,
                seed=recipe.seed,
                scale=recipe.step.scale,
                step=steps[0],
                world_size=ranks.world_size,
                started=started,
                about=about,
            )
            say(f"written: {target}")
        leave_job()
    return 0


def _other_shards(shards: str, settings: DataSettings, split: str, trained: Manifest) -> Manifest:
    """The manifest of other shards with this split, all of whose classes were trained.

    Raises:
        DataError: there are no such shards, or a class is not the run's.
    """
    from paco_ds.data.manifest import open_data
    from paco_ds.evaluation.split import class_index

    other = open_data(settings.model_copy(update={"shards": shards, "classes": None}), [split])
    class_index(other, trained)
    return other


def _fit_temperature(
    run: Path,
    model: Ensemble,
    settings: EvaluationSettings,
    judged: Callable[[str], EvaluationSplit],
    ranks: Ranks,
) -> None:
    """Fit a temperature on the validation split and store it in the run."""
    from paco_ds.checkpoint import chosen_checkpoint
    from paco_ds.evaluation.temperature import checkpoint_digest, fit_on_split, save_temperature, validation_split

    split = judged(validation_split(settings))
    split.manifest.check_files(split.name)
    checkpoint = chosen_checkpoint(run, settings.checkpoint)
    fitted = fit_on_split(model, split, ranks, checkpoint_digest(checkpoint, settings.weights))
    if ranks.first:
        path = save_temperature(run, fitted)
        nll = f"NLL of {split.name} {fitted.nll_before:.4f} -> {fitted.nll_after:.4f}"
        say(f"written: {path}: temperature {fitted.temperature:.4f}, {nll}")


def _tau_of(
    option: str,
    tau: str,
    settings: EvaluationSettings,
    judged: Callable[[str], EvaluationSplit],
    choose: Callable[[EvaluationSplit, Ranks], tuple[float, dict[float, float]]],
    ranks: Ranks,
) -> float:
    """The tau of an option; `auto` chooses it on the validation split."""
    from paco_ds.errors import RecipeError

    if tau != "auto":
        return float(tau)
    split = settings.split
    if split is None:
        raise RecipeError(f"{option} auto chooses tau on evaluation.split, which is null: give a number instead")
    if split == settings.test_split:
        raise RecipeError(
            f"{option} auto would choose tau on {split}, the test split: give a number, or shards with a "
            f"validation split (paco-build-shards build ... --validation-share .05)"
        )
    validation = judged(split)
    validation.manifest.check_files(split)
    chosen, balanced = choose(validation, ranks)
    if ranks.first:
        say(f"tau {chosen}: balanced accuracy on {split} " + ", ".join(f"{t}: {a:.3f}" for t, a in balanced.items()))
    return chosen


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run",
        required=True,
        type=Path,
        action="append",
        help="run directory of a training; several of one data set are evaluated as an ensemble",
    )
    parser.add_argument("--output", type=Path, help="where to write; RUN/metrics.json by default, needed for several")
    parser.add_argument(
        "--tau-normalize",
        metavar="TAU",
        type=_tau,
        help="normalise the centers of a trained run with this tau, 0 to 2, or `auto`: the best on evaluation.split",
    )
    parser.add_argument(
        "--logit-adjust",
        metavar="TAU",
        type=_tau,
        help="subtract tau times the log of the training share from each class's logit, of a run trained without the "
        "prior; 0 to 2, or `auto`: the best on evaluation.split",
    )
    parser.add_argument(
        "--aggregate-experts",
        action="store_true",
        help="weigh the experts' logits by weights learned on the test images without labels (SADE), for them as they "
        "are and for simulated forward and backward long-tailed test distributions",
    )
    parser.add_argument(
        "--data", metavar="SHARDS", help="other shards whose images are evaluated, of the run's classes"
    )
    parser.add_argument(
        "--fit-temperature",
        action="store_true",
        help="fit a temperature on evaluation.split and store it as RUN/temperature.json, for paco-predict",
    )
    parser.add_argument("--split", help="split to evaluate; the recipe's evaluation.test_split by default")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override a setting")
    parser.add_argument("--allow-code", action=AllowCode)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the launcher
    return parser


def _tau(text: str) -> str:
    try:
        if text == "auto" or 0 <= float(text) <= 2:
            return text
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text} is neither a number from 0 to 2 nor auto")


if __name__ == "__main__":
    sys.exit(main())

"""Evaluate a run, on one rank or, by the launcher, on many.

examples:
  paco-evaluate --run runs/demo
  deepspeed --module paco_ds.evaluate --run runs/demo
  paco-evaluate --run runs/demo --data data/another-test-set

Prints Many / Medium / Few / All, top-1 and top-5, and writes RUN/metrics.json (of another split metrics-SPLIT.json, of
other shards metrics-FOLDER-SPLIT.json). Reads the portable checkpoint; no DeepSpeed engine is needed, and every image
is counted once on any number of ranks. Several --run are an ensemble: their probabilities are averaged. --data takes
the images from other shards of the same classes, or of some of them; shots are still those of the run.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` hears Ctrl-C: no traceback of an import
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # a checkout need not be installed

from paco_ds.command import Screen, one_line_on_interrupt, report_user_errors, say
from paco_ds.config.load import load_recipe_of_run
from paco_ds.config.plugins import AllowCode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from paco_ds.evaluation.accuracy import ShotAccuracy
    from paco_ds.evaluation.trained_runs import RunImages


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if excluded := _exclude_each_other(arguments):
        parser.error(excluded)
    with one_line_on_interrupt():
        return _evaluate(arguments)


def _exclude_each_other(arguments: argparse.Namespace) -> str | None:
    """Which options do not go together, in words; None if all do."""
    several = len(arguments.run) > 1
    corrected = arguments.tau_normalize is not None or arguments.logit_adjust is not None
    if several and arguments.output is None:
        return "an ensemble belongs to no run: say with --output FILE.json where its figures go"
    if several and arguments.tau_normalize is not None:
        return "--tau-normalize is of one run"
    if arguments.aggregate_experts and (several or corrected or arguments.fit_temperature):
        return "--aggregate-experts is of one run as it was trained"
    if arguments.fit_temperature and (several or corrected or arguments.data):
        return "--fit-temperature is of one run as it was trained"
    return None


def _evaluate(arguments: argparse.Namespace) -> int:
    with report_user_errors():  # mistakes in settings are reported before torch is loaded
        recipes = [load_recipe_of_run(run, arguments.set) for run in arguments.run]
    # not at the top: loader processes read this file again, and need none of it
    from paco_ds.checkpoint import same_on_all_ranks
    from paco_ds.data.manifest import open_data
    from paco_ds.distributed.launch import join_job, leave_job
    from paco_ds.distributed.watchdog import RankWatchdog
    from paco_ds.evaluation import trained_runs
    from paco_ds.evaluation.results import now
    from paco_ds.evaluation.runner import Ensemble, evaluate

    with report_user_errors(), RankWatchdog():
        started, recipe = now(), recipes[0]
        split = arguments.split or recipe.evaluation.test_split
        manifest = open_data(recipe.data, [] if arguments.data else [split])
        other = trained_runs.other_shards(arguments.data, recipe.data, split, manifest) if arguments.data else None
        images = trained_runs.RunImages(recipe, manifest, split, other)
        members, checkpoints = trained_runs.load_members(arguments.run, recipes, manifest)
        ranks = join_job(recipe.engine.threads)
        for run, checkpoint in zip(arguments.run, checkpoints, strict=True):
            same_on_all_ranks(checkpoint, run, ranks)
        step = checkpoints[0].step
        about = trained_runs.about(arguments.run, images)
        if (tau := arguments.tau_normalize) is not None:
            members, about["tau_normalization"] = trained_runs.with_normalized_centers(tau, *members[0], images, ranks)
        ensemble = Ensemble(members).to(ranks.device)
        model: nn.Module = ensemble
        if arguments.fit_temperature:
            trained_runs.fit_temperature(arguments.run[0], checkpoints[0], ensemble, images, ranks)
        if (tau := arguments.logit_adjust) is not None:
            model, about["logit_adjustment"] = trained_runs.with_adjusted_logits(tau, ensemble, images, ranks)
        if arguments.aggregate_experts:
            aggregated, weights = trained_runs.with_weighed_experts(*members[0], images, ranks)
            model = aggregated
        accuracy = evaluate(model, model, images.evaluated, ranks, experts=recipe.model.experts)
        if arguments.aggregate_experts:
            about |= trained_runs.about_aggregation(aggregated, weights, images, ranks)
        if ranks.first:
            _report(arguments, accuracy, images, step=step, world_size=ranks.world_size, started=started, about=about)
        leave_job()
    return 0


def _report(
    arguments: argparse.Namespace,
    accuracy: ShotAccuracy,
    images: RunImages,
    *,
    step: int,
    world_size: int,
    started: str,
    about: Mapping[str, Any],
) -> None:
    """Print the table, and write metrics.json or the file that stands for it."""
    from paco_ds.evaluation.results import results_file, write_results

    runs, recipe, split, other = arguments.run, images.recipe, images.split, images.other
    if other is not None and len(other.classes) < (classes := len(images.manifest.classes)):
        of_all = f"{len(other.classes)} of the {classes} classes"
        say(f"{arguments.data} has {of_all}; predictions are among all of them")
    if other is not None and other.background != images.manifest.background:
        here, there = images.manifest.background or "none", other.background or "none"
        say(f"background under transparent parts: {there} in {arguments.data}, {here} in the run's shards")
    what = f"{recipe.name}, step {step}" if len(runs) == 1 else f"ensemble of {len(runs)} runs"
    Screen().print(accuracy.table(f"{what}, on {split}"))
    of_run = results_file(runs[0], split, recipe.evaluation.test_split, images.manifest, other)
    target = arguments.output or of_run
    write_results(
        target,
        accuracy,
        images.evaluated,
        run=recipe.name,
        seed=recipe.seed,
        scale=recipe.step.scale,
        step=step,
        world_size=world_size,
        started=started,
        about=about,
    )
    say(f"written: {target}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--run",
        required=True,
        type=Path,
        action="append",
        help="run directory of a training; several of one data set are evaluated as an ensemble",
    )
    parser.add_argument("--output", type=Path, help="where to write; in RUN by default, needed for several")
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

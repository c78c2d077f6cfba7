"""Evaluate a run: `python paco_ds/evaluate.py --run RUN` (or `deepspeed paco_ds/evaluate.py --run RUN` on many ranks).

Prints Many / Medium / Few / All, top-1 and top-5, and writes RUN/metrics.json. Reads the portable checkpoint; no
DeepSpeed engine is needed, and every image is counted once on any number of ranks.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# The launcher puts this folder first on the path, where `paco_ds` itself cannot be imported from.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from paco_ds.command import report_user_errors


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = _parser().parse_args(argv)
    # not at the top: loader processes read this file again, and need none of it
    import torch
    from rich.console import Console

    from paco_ds.checkpoint import newest_checkpoint
    from paco_ds.data.manifest import open_data
    from paco_ds.distributed import join_job, leave_job
    from paco_ds.evaluation.results import now, write_results
    from paco_ds.evaluation.runner import evaluate
    from paco_ds.models.recogniser import make_recogniser
    from paco_ds.rank_watchdog import RankWatchdog
    from paco_ds.recipe_file import load_recipe

    with report_user_errors(), RankWatchdog():
        started = now()
        checkpoint = newest_checkpoint(arguments.run)
        recipe = load_recipe(arguments.run / "recipe.yaml", arguments.set)
        split = arguments.split or recipe.evaluation.test_split
        manifest = open_data(recipe, [split])
        checkpoint.check_data(manifest.sha256)
        ranks = join_job(recipe.engine.threads)
        model = make_recogniser(recipe, len(manifest.classes), manifest.mean, manifest.std)
        model.load_state_dict(checkpoint.model())
        model.to(ranks.device)
        # the precision it was trained with, so that its figures come out again
        with torch.autocast(ranks.device.type, torch.bfloat16, enabled=checkpoint.state["autocast"]):
            accuracy = evaluate(model, model, recipe, manifest, split, ranks)
        if ranks.first:
            Console().print(accuracy.table(f"{recipe.name}, step {checkpoint.step}, on {split}"))
            target = arguments.run / (
                "metrics.json" if split == recipe.evaluation.test_split else f"metrics-{split}.json"
            )
            write_results(
                target,
                accuracy,
                recipe,
                manifest,
                split=split,
                step=checkpoint.step,
                world_size=ranks.world_size,
                started=started,
            )
            print(f"written: {target}")
        leave_job()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="run directory of a training")
    parser.add_argument("--split", help="split to evaluate; the recipe's evaluation.test_split by default")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override a setting")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the launcher
    return parser


if __name__ == "__main__":
    sys.exit(main())

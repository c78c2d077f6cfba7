"""Train a recipe: `deepspeed [--hostfile hosts] paco_ds/train.py --config RECIPE.yaml --output RUN`.

Run again, the same command goes on where the run in RUN stopped, also in mid-epoch and on another legal number of
ranks.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # a checkout need not be installed

from paco_ds.command import report_user_errors
from paco_ds.config.load import load_recipe


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = _parser().parse_args(argv)
    # not at the top: loader processes read this file again, and need no DeepSpeed
    from paco_ds.checkpoint import resume_hint
    from paco_ds.distributed.launch import leave_job
    from paco_ds.distributed.watchdog import RankWatchdog
    from paco_ds.training import engine
    from paco_ds.training.trainer import Trainer

    with report_user_errors(), RankWatchdog(lambda: resume_hint(arguments.output)):
        recipe = load_recipe(arguments.config, arguments.set)
        ranks = engine.start(recipe, arguments.expect_ranks)
        trainer = Trainer(recipe, arguments.output, ranks, arguments.stop_at_step)
        try:
            trainer.run()
        finally:
            trainer.close()
        ranks.wait_for_all()
        leave_job()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="recipe, YAML; see ds_configs/recipes/")
    parser.add_argument("--output", required=True, type=Path, help="run directory, on storage all hosts share")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override a setting")
    parser.add_argument("--expect-ranks", type=int, help="end at once if the job has another number of ranks")
    parser.add_argument("--stop-at-step", type=int, help="write a checkpoint after this many steps and end")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the launcher
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""Train a recipe. Run again, the same command resumes the run in --output, also in mid-epoch and on another number of
ranks.

examples:
  deepspeed --hostfile hosts paco_ds/train.py                    the demo, on the images that ship, into runs/demo
  deepspeed --module paco_ds.train --config imagenet_lt_resnet50 --set data.shards=data/imagenet_lt --output runs/a
  paco-train --config demo --set schedule.epochs=2               one rank, without a launcher
  paco-train --config demo --ranks 2 --restarts 5                two ranks on this host, started again when one is lost
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` hears Ctrl-C: no traceback of an import
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # a checkout need not be installed

from paco_ds.command import Screen, at_least, report_user_errors, say, silence_known_noise
from paco_ds.config.load import load_recipe
from paco_ds.config.plugins import AllowCode
from paco_ds.config.shipped import RECIPES, card_with_images
from paco_ds.errors import RESUMABLE, DataError, UserError
from paco_ds.training.outcome import Ending, run_directory
from paco_ds.training.stop_request import StopRequest

if TYPE_CHECKING:
    from paco_ds.config.engine import EngineSettings
    from paco_ds.config.recipe import Recipe
    from paco_ds.distributed.ranks import Ranks
    from paco_ds.training.trainer import Trainer


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = _parser().parse_args(argv)
    if arguments.restarts is not None or arguments.ranks is not None:
        with report_user_errors():
            return _keep_running(arguments, sys.argv[1:] if argv is None else argv)
    stop_request = StopRequest()  # before what takes seconds to load
    silence_known_noise()
    if arguments.replay:
        with report_user_errors():
            return _replay(arguments.replay)
    with report_user_errors():  # mistakes in settings are reported before torch is loaded
        recipe = load_recipe(arguments.config or "demo", arguments.set)
        # not at the top: loader processes read this file again, and need no DeepSpeed
        from paco_ds.checkpoint import hint_after_storage_errors, resume_hint
        from paco_ds.distributed.launch import leave_job
        from paco_ds.distributed.watchdog import RankWatchdog
        from paco_ds.evaluation.results import versions
        from paco_ds.metrics.targets import served_metrics
        from paco_ds.training import engine
        from paco_ds.training.saver import sole_writer
        from paco_ds.training.trainer import Trainer

    output = run_directory(arguments.output, arguments.config)
    with (
        report_user_errors(),
        hint_after_storage_errors(output),
        Ending(output) as ending,
        RankWatchdog(lambda: resume_hint(output), ending.end_process) as watchdog,
    ):
        ending.message = lambda: watchdog.message
        recipe = recipe if arguments.config else _demo(arguments.set)
        ranks = engine.start(recipe.step, recipe.engine.threads, arguments.expect_ranks)
        if ranks.first and not arguments.config:
            say(
                f"no --config: training the recipe demo into {output}; for another give --config FILE.yaml or the "
                f"name of one in {RECIPES}"
            )
        _build_missing_shards(recipe.data.shards, ranks)
        watchdog.heartbeat.hang_seconds = recipe.engine.hang_seconds
        build = {**versions(), "method": recipe.loss.method, "world_size": str(ranks.world_size)}
        with (
            sole_writer(output, ranks) as lock,
            served_metrics(recipe.metrics, output, ranks, build, watchdog.heartbeat) as metrics,
        ):
            before = ending.begin() if ranks.first else ""
            trainer = Trainer(
                recipe,
                output,
                ranks,
                arguments.stop_at_step,
                stop_request,
                lock,
                watchdog.heartbeat,
                metrics,
                _StagePlanner(recipe, ranks.world_size),
            )
            ending.step = lambda: trainer.steps_done
            if 0 < trainer.steps_done < trainer.total_steps:
                trainer.logger.restart(trainer.steps_done, before)
            try:
                status, reason = _train(trainer)
            finally:
                trainer.close()
            ending.write(status, reason)
        ranks.wait_for_all()
        leave_job()
    return status


@dataclass(frozen=True)
class _StagePlanner:
    """Decides `engine.deepspeed: auto` on CUDA by a plan of the run's memory, see `choose_on_ranks`."""

    recipe: Recipe
    world_size: int

    def __call__(self, chosen: EngineSettings, gpu_memory: int) -> tuple[int, str]:
        """(the ZeRO stage, what decided it) for GPUs of so many bytes."""
        from paco_ds.planning.plan import find_data, make_plan, planned_stage  # loads torch's compiler

        planned, data = self.recipe.model_copy(update={"engine": chosen}), find_data(self.recipe.data, None, None)
        plan = make_plan(planned, self.world_size, data, gpu_memory=gpu_memory)
        return planned_stage(plan)


def _train(trainer: Trainer) -> tuple[int, str]:
    """Run it; (exit status, how it ended)."""
    accuracy = trainer.run()
    if accuracy is None and trainer.stop_agreed:
        return RESUMABLE, f"asked to stop ({trainer.stop_request.reason or 'another rank was'})"
    return 0, "finished" if accuracy else f"stopped after step {trainer.steps_done}, as the command says"


def _keep_running(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Start the ranks of this command on this host, again when they end early.

    Raises:
        UserError: this process is itself a rank of a launcher.
    """
    from paco_ds.training.keep_running import Keeper, local_ranks

    if "RANK" in os.environ:
        raise UserError("--restarts and --ranks start ranks on this host: give them without a launcher (see --help)")
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--restarts", "--ranks"):
        own.add_argument(option)
    command = [sys.executable, "-u", __file__, *own.parse_known_args(argv)[1]]
    run, ranks = run_directory(arguments.output, arguments.config), arguments.ranks or 1
    return Keeper(run, arguments.restarts or 0, lambda: local_ranks(command, ranks)).run()


def _replay(folder: Path) -> int:
    """Run a kept step on one rank and print what is wrong with it."""
    from paco_ds.distributed.launch import leave_job
    from paco_ds.training import engine
    from paco_ds.training.replay import read_kept_step, replay

    kept = read_kept_step(folder)
    ranks = engine.start(kept.recipe.step, kept.recipe.engine.threads, expect_ranks=1)
    for line in replay(kept, ranks).lines():
        say(line)
    leave_job()
    return 0


def _demo(overrides: Sequence[str]) -> Recipe:
    """The demo on any number of ranks: those that cannot share its step evenly run one micro-batch each."""
    from paco_ds.distributed.launch import environment_ranks

    _, world_size, _ = environment_ranks()
    recipe = load_recipe("demo", overrides)
    if recipe.step.micro_batches % world_size:
        recipe = load_recipe("demo", (f"step.micro_batches={world_size}", *overrides))
    return recipe


def _build_missing_shards(shards: str, ranks: Ranks) -> None:
    """Build shards that are missing on rank 0, while the others wait, if the card and its images ship.

    Raises:
        DataError: the build failed; on every rank alike.
    """
    from paco_ds.data.manifest import MANIFEST_FILE
    from paco_ds.data.pack.card import load_card
    from paco_ds.data.pack.shards import build_shards

    card, failure = card_with_images(shards), None
    if ranks.first and card is not None and not Path(shards, MANIFEST_FILE).exists():
        try:
            build_shards(load_card(card), card.parent / load_card(card).root, shards, console=Screen())
        except (UserError, OSError) as error:
            failure = f"{shards} could not be built from {card}: {error}"
    if failure := ranks.gather_objects(failure)[0]:
        raise DataError(failure)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="recipe, YAML: a path, or the name of a shipped one; demo by default")
    parser.add_argument(
        "--output", type=Path, help="run directory, on storage all hosts share; runs/NAME OF THE RECIPE by default"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override a setting")
    parser.add_argument("--allow-code", action=AllowCode)
    parser.add_argument("--expect-ranks", type=at_least(1), help="end at once if the job has another number of ranks")
    parser.add_argument("--ranks", type=at_least(1), help="start this many ranks on this host")
    parser.add_argument(
        "--restarts",
        type=at_least(0),
        metavar="N",
        help="start again after a lost rank, a hang or a kill; end after N starts in a row without a new checkpoint",
    )
    parser.add_argument("--stop-at-step", type=at_least(1), help="write a checkpoint after this many steps and end")
    parser.add_argument(
        "--replay", type=Path, metavar="FOLDER", help="run a skipped step that a run kept again, on one rank, and end"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the launcher
    return parser


if __name__ == "__main__":
    sys.exit(main())

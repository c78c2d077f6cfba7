"""Train the rows of a table over seeds, and draw them beside the paper's numbers.

examples:
  paco-reproduce --table 13 --scale small --data fashion-mnist-lt --output runs/table13
  paco-reproduce --table 9 --scale paper --output runs/table9       writes the commands for a cluster

Each (row, seed) is a separate run, launched as a user would, so an interrupted table can be resumed. A second stage
starts from the run of the row that it names, which is trained first. With --keep FILE the result of each finished run
is kept as a line of FILE (JSON lines). A kept result of the same recipe, data and seed counts as done, so a table can
be resumed and drawn in another clone without the runs. Tables of one data set may share FILE; common rows are trained
once. A kept result of another recipe is refused.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from paco_ds.command import at_least, report_user_errors, say
from paco_ds.config.parse import read_json
from paco_ds.config.plugins import AllowCode, code_is_allowed
from paco_ds.config.recipe import Recipe
from paco_ds.config.shipped import PACKAGE, data_folder, find_card
from paco_ds.data.manifest import MANIFEST_FILE
from paco_ds.data.pack.card import load_card
from paco_ds.errors import RecipeError, UserError, redacted
from paco_ds.files import is_url, sha256_file
from paco_ds.paper.results import Identity, KeptResults
from paco_ds.paper.tables import Row, Table, load_table, small_recipe

if TYPE_CHECKING:  # with torch and matplotlib, which --help need not wait for
    from paco_ds.paper.comparison import SeedResult


@dataclass(frozen=True)
class Job:
    """One training: a row with a seed, in its own folder.

    Attributes:
        small: the small recipe that replaces the row's recipe, or None.
        extra: overrides given for every row.
        keep: kept results, or None.
    """

    table: Table
    row: Row
    seed: int
    output: Path
    small: Path | None
    extra: tuple[str, ...]
    keep: KeptResults | None = None

    @property
    def name(self) -> str:
        """Row and seed, as text."""
        return f"{self.row.name}, seed {self.seed}"

    @property
    def run(self) -> Path:
        return self.output / f"{self.row.folder}-seed{self.seed}"

    @property
    def results(self) -> Path:
        """metrics.json of the training, or the output of its evaluation with options."""
        return self.run / ("metrics-of-row.json" if self.row.evaluate else "metrics.json")

    @property
    def kept(self) -> bool:
        """Whether its result is kept."""
        return self.keep is not None and self.run.name in self.keep

    @property
    def done(self) -> bool:
        """Whether its result exists."""
        return self.kept or (self.keep is None and self.results.exists())

    @cached_property
    def first_stage(self) -> Job | None:
        """The training of its first stage, if it is a second stage."""
        row = self.table.first_stage(self.row)
        return None if row is None else replace(self, row=row)

    @property
    def overrides(self) -> tuple[str, ...]:
        """Overrides after those of the row: the seed, those of every row, and a second stage's start."""
        first = self.first_stage
        start = (f"{self.row.start}={first.run}",) if first else ()
        return (f"seed={self.seed}", *self.extra, *start)

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe with all overrides.

        Raises:
            RecipeError: recipe and overrides are not compatible.
        """
        return self.table.resolve(self.row, self.small, self.overrides)

    def check(self) -> None:
        """Check the job before anything is trained.

        Raises:
            RecipeError: recipe and overrides are not compatible with each other or with the first stage.
            UserError: the kept result belongs to another training.
        """
        from paco_ds.training.initial_weights import require_same_network

        recipe, first = self.recipe, self.first_stage
        if first is not None:
            first.check()
        if first is not None and self.row.start == "model.start_from":
            require_same_network(first.recipe.model, recipe.model, first.run)
        if self.kept:
            self.figures()

    def training(self, launcher: Sequence[str]) -> list[str]:
        """The command that starts or resumes the training."""
        overrides = [f"--set={override}" for override in self.table.overrides(self.row, self.small, self.overrides)]
        recipe = str(self.small or self.table.recipe_of(self.row))
        command = [*launcher, str(PACKAGE / "train.py"), "--config", recipe, "--output", str(self.run), *overrides]
        return [*command, *_allowance()]

    def evaluation(self) -> list[str] | None:
        """The command that gives the row's accuracies, if it differs from the evaluation at the end of training."""
        if not self.row.evaluate:
            return None
        script = str(PACKAGE / "evaluate.py")
        command = [sys.executable, script, f"--run={self.run}", f"--output={self.results}", *self.row.evaluate]
        return [*command, *_allowance()]

    def figures(self) -> dict[str, Any]:
        """Its metrics on the test split, kept or of the run.

        Raises:
            UserError: the kept result belongs to another training.
        """
        if self.keep is None:
            return dict(read_json(self.results, UserError))
        identity, before = Identity.of(self.recipe), self._first_identity
        return self.keep.read(self.run.name, identity, before, self.row.evaluate, self._manifest_sha256())

    def read(self) -> SeedResult:
        """Its top-1 accuracies; raises as `figures` does."""
        from paco_ds.evaluation.correctness import KEY, unpacked
        from paco_ds.paper.comparison import SeedResult

        figures = self.figures()
        correct = unpacked(figures, self.name) if KEY in figures else None  # not of versions before it was kept
        accuracies = {name: figures[name] for name in ("many", "medium", "few", "all")}
        return SeedResult(seed=self.seed, **accuracies, correct=correct)

    def keep_result(self) -> None:
        """Keep the result of the finished run, with --keep."""
        if self.keep is None:
            return
        from paco_ds.metrics.log import read as read_log
        from paco_ds.metrics.steps import steps_of

        trained = read_json(self.run / "metrics.json", UserError)
        counted = ((steps_of(line), line) for line in read_log(self.run / "metrics.jsonl"))
        self.keep.keep(
            self.run.name,
            read_json(self.results, UserError),
            Identity.of(self.recipe),
            self._first_identity,
            self.row.evaluate,
            ranks=trained["world_size"],
            seconds=sum(steps * line["step_seconds"] for steps, line in counted if steps),
        )

    @property
    def _first_identity(self) -> Identity | None:
        return Identity.of(self.first_stage.recipe) if self.first_stage else None

    def _manifest_sha256(self) -> str | None:
        shards = self.recipe.data.shards
        manifest = Path(shards) / MANIFEST_FILE
        return None if is_url(shards) or not manifest.exists() else sha256_file(manifest)


def _allowance() -> list[str]:
    """The option that hands the permission to import code on to a training."""
    return ["--allow-code"] if code_is_allowed() else []


class Trainings:
    """Launches each training once; concurrent jobs that need it wait for its outcome.

    Args:
        ranks: number for each training.
        quiet: whether output goes to RUN/run.log.
    """

    def __init__(self, ranks: int, quiet: bool) -> None:
        self._ranks, self._quiet = ranks, quiet
        self._outcomes: dict[Path, Future[None]] = {}
        self._lock = Lock()

    def run(self, job: Job) -> None:
        """Start or resume the training of a row with a seed, unless its result is kept.

        Raises:
            UserError: the training or its evaluation failed, or that of its first stage.
        """
        if job.kept:
            return
        if job.first_stage is not None:  # its weights are needed, even if its result is kept
            self._train(job.first_stage)
        self._train(job)
        job.keep_result()

    def _train(self, job: Job) -> None:
        with self._lock:
            first = job.run not in self._outcomes
            outcome = self._outcomes.setdefault(job.run, Future())
        if first:
            try:
                _launch(job, self._ranks, self._quiet)
                outcome.set_result(None)
            except BaseException as error:
                outcome.set_exception(error)
        outcome.result()


def _launch(job: Job, ranks: int, quiet: bool) -> None:
    """Run its training and its evaluation, as a user would. A finished run is run too: it checks that it was
    trained with this row's recipe, and evaluates."""
    # ranks of this host need no launcher, whose two processes load torch for each row
    training = [*job.training([sys.executable]), "--ranks", str(ranks), "--restarts", "0"]
    job.run.mkdir(parents=True, exist_ok=True)
    log = job.run / "run.log"
    for command in (training, job.evaluation()):
        if command is None:
            continue
        with log.open("a") as file:
            output = file if quiet else None
            status = subprocess.run(command, check=False, stdout=output, stderr=output).returncode
        if status:
            where = str(log) if quiet else "above"
            raise UserError(f"{job.name} did not finish; see {where}. Run the same command again to resume")


def run_jobs(jobs: Sequence[Job], ranks: int, at_once: int) -> None:
    """Train all, `at_once` at a time; after a failure no further training starts."""
    trainings = Trainings(ranks, quiet=at_once > 1)
    with ThreadPoolExecutor(at_once) as pool:
        running = [pool.submit(trainings.run, job) for job in jobs]
        try:
            for job, future in zip(jobs, running, strict=True):
                future.result()
                say(f"{job.name}: All {100 * job.read().all:.1f} %")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def draw(table: Table, jobs: Sequence[Job], output: Path) -> None:
    """Print and draw the accuracies of the runs, beside the paper's.

    Raises:
        UserError: rows that were not run yet, or results of other trainings or data.
    """
    from paco_ds.paper.comparison import MethodResults, write_comparison

    missing = [f"{job.row.name} (seed {job.seed})" for job in jobs if not job.done]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(jobs)} runs are missing: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}. Run the same command without --draw-only first"
        )
    _check_same_data(jobs)
    rows = [
        MethodResults(
            row.method,
            [job.read() for job in jobs if job.row is row],
            row.paper.fractions() if row.paper else None,
            row.backbone,
            _deviation(job for job in jobs if job.row is row),
            row.trials,
        )
        for row in table.rows
        if row.drawn
    ]
    output.mkdir(parents=True, exist_ok=True)  # it does not exist if all results were kept
    page, picture = output / "comparison.html", output / "comparison.png"
    write_comparison(rows, page, picture, title=table.title)
    say(f"written: {page}, {picture}, {page.with_suffix('.md')}")


def _deviation(jobs: Iterable[Job]) -> str | None:
    """The precision of runs, by their metrics, where another one is published: the recipes say which."""
    found = set()
    for job in jobs:
        execution = job.figures().get("execution") or {}
        ran, published = execution.get("precision"), job.recipe.engine.published_precision
        if None not in (ran, published) and ran != published:
            found.add(f"{ran} where {published} is published")
    return ", ".join(sorted(found)) or None


def _check_same_data(jobs: Sequence[Job]) -> None:
    """Raise UserError unless all results are from the same shards."""
    first, *others = (job.figures().get("manifest_sha256") for job in jobs)
    for job, other in zip(jobs[1:], others, strict=True):
        if other != first:
            raise UserError(
                f"{jobs[0].name} was trained on other shards than {job.name} (manifests {first} and {other}): keep the "
                f"results of each data set in its own folder"
            )


def write_commands(jobs: Sequence[Job], path: Path) -> None:
    """Write the commands of all trainings and evaluations as a script for a cluster with hostfile `hosts`."""
    lines = ["#!/bin/sh", "# An interrupted training resumes when its command is given again.", "set -e"]
    trained: set[Path] = set()
    for job in itertools.chain.from_iterable((each.first_stage, each) for each in jobs):
        if job is None or job.run in trained:
            continue
        trained.add(job.run)
        lines += ["", _comment(f"{job.row.name}, seed {job.seed}")]
        if job.row.inferred:
            lines.append(_comment(f"inferred: {job.row.inferred}"))
        if (published := job.recipe.engine.published_precision) is not None:
            lines.append(_comment(f"published in {published}: --set engine.precision=published"))
        lines.append(shlex.join(job.training(["deepspeed", "--hostfile", "hosts"])))
        if (evaluation := job.evaluation()) is not None:
            lines.append(shlex.join(["python", *evaluation[1:]]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(redacted("\n".join(lines)) + "\n")


def _comment(text: str) -> str:
    """A comment of a script: on one line, so that a name of a table is no command."""
    return f"# {' '.join(text.split())}"


def build_shards(card: Path, shards: Path) -> None:
    """Build the shards of a card, if they are not there yet.

    Raises:
        UserError: the build failed.
    """
    if not (shards / MANIFEST_FILE).exists():
        from paco_ds.data.pack.command import main as build

        if build(["build", str(card), "--output", str(shards)]):
            raise UserError(f"the shards of {card} could not be built; see above")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = _parser().parse_args(argv)
    with report_user_errors():
        table = load_table(arguments.table)
        small, extra = None, list(arguments.set)
        if arguments.data is not None:
            card = find_card(arguments.data)
            name = load_card(card).name.lower()  # as its recipe and its folder of shards are called
            shards = data_folder() / name
            extra.insert(0, f"data.shards={shards}")
        if arguments.scale == "small":
            if arguments.data is None:
                raise RecipeError("--scale small needs --data, a card such as fashion-mnist-lt")
            small = small_recipe(name)
            table = table.model_copy(update={"title": f"{table.title}; here stand-ins on {name}"})
        elif arguments.scale is None and table.scale == "paper":
            raise RecipeError(
                f"{table.title} has recipes for a cluster: give --scale small with --data CARD to train "
                f"stand-ins here, or --scale paper for the commands of a cluster"
            )
        if arguments.jobs > 1:
            threads = max(1, len(os.sched_getaffinity(0)) // (arguments.jobs * arguments.ranks))
            extra.append(f"engine.threads={threads}")
        keep = KeptResults(arguments.keep) if arguments.keep else None
        jobs = [
            Job(table, row, seed, arguments.output, small, tuple(extra), keep)
            for row in table.rows
            if row.drawn
            for seed in range(1, arguments.seeds + 1)
        ]
        if arguments.scale == "paper":
            write_commands(jobs, arguments.output / "commands.sh")
            say(f"written: {arguments.output / 'commands.sh'}")
            return 0
        for job in jobs:  # so that a mistake in the last row is reported before the first is trained
            job.check()
        if not arguments.draw_only:
            if arguments.scale == "small" and not all(job.kept for job in jobs):
                build_shards(card, shards)
            run_jobs(jobs, arguments.ranks, arguments.jobs)
        draw(table, jobs, arguments.output)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", required=True, help="9 to 14, or another by path or name: demo, methods")
    parser.add_argument("--output", required=True, type=Path, help="directory of the runs and of the drawn table")
    parser.add_argument(
        "--scale", choices=["small", "paper"], help="train small stand-ins here, or write commands for a cluster"
    )
    parser.add_argument("--data", type=Path, help="card of the data set, by path or name; built if need be")
    parser.add_argument("--seeds", type=at_least(1), default=3, help="seeds 1 to N for every row")
    parser.add_argument("--ranks", type=at_least(1), default=2, help="ranks of each training on this host")
    parser.add_argument(
        "--jobs", type=at_least(1), default=1, help="trainings at a time, each with its output in RUN/run.log"
    )
    parser.add_argument("--keep", type=Path, help="file of kept results, a JSON line for each finished run; see above")
    parser.add_argument("--draw-only", action="store_true", help="train nothing, draw existing results")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override for every row")
    parser.add_argument("--allow-code", action=AllowCode)
    return parser


if __name__ == "__main__":
    sys.exit(main())

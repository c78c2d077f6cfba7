"""Tables: the rows of a table file trained one after the other over seeds, and drawn beside each other.

A table names rows as recipe plus overrides, so that nothing is copied:

    title: Fashion-MNIST-LT, ...
    recipe: ../recipes/demo.yaml
    rows:
      - {method: Cross-entropy, set: [loss.method=cross_entropy]}
      - {method: PaCo, set: []}

Each (row, seed) is a run of its own, launched as a user would launch it, so an interrupted table goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import yaml
from pydantic import ValidationError, model_validator

from paco_ds.command import report_user_errors
from paco_ds.errors import RecipeError, UserError
from paco_ds.recipe import Section
from paco_ds.report.comparison import MethodResults, SeedResult, write_comparison

TRAIN = Path(__file__).with_name("train.py")


class Row(Section):
    """One line of a table: a method and how it differs from the table's recipe."""

    method: str
    set: tuple[str, ...] = ()


class Table(Section):
    """The rows that are compared; everything but a row's overrides and the seed is the same for all."""

    title: str
    recipe: str
    rows: tuple[Row, ...]

    @model_validator(mode="after")
    def _runs_are_apart(self) -> Self:
        names = [_slug(row.method) for row in self.rows]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"rows share the run folders {sorted(twice)}; give each row a method name of its own")
        return self


def load_table(path: Path) -> Table:
    """Read a table file; its recipe's path is relative to it.

    Raises:
        RecipeError: names the file and what is wrong in it.
    """
    try:
        table = Table.model_validate(yaml.safe_load(path.read_text()))
    except FileNotFoundError:
        raise RecipeError(f"no table at {path}; tables of this project lie in ds_configs/tables/") from None
    except (yaml.YAMLError, ValidationError) as error:
        raise RecipeError(f"{path}: {error}") from None
    return table.model_copy(update={"recipe": str((path.parent / table.recipe).resolve())})


def run_row(table: Table, row: Row, seed: int, output: Path, ranks: int, extra: Sequence[str]) -> SeedResult:
    """Train a row with a seed, or go on with it, and read what it reached on the test split.

    A finished run is launched too: it checks that it was trained by this row's recipe, and evaluates.

    Raises:
        UserError: the training failed.
    """
    run = output / f"{_slug(row.method)}-seed{seed}"
    overrides = [f"--set={override}" for override in (*row.set, f"seed={seed}", *extra)]
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "--num_gpus", str(ranks), str(TRAIN), "--config", table.recipe, "--output", str(run)]
    if subprocess.run([*command, *overrides], check=False).returncode:
        raise UserError(f"{row.method}, seed {seed} did not finish; see above. The same command goes on from there")
    figures = json.loads((run / "metrics.json").read_text())
    return SeedResult(seed=seed, **{name: figures[name] for name in ("many", "medium", "few", "all")})


def _slug(method: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in method.lower())


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", required=True, type=Path, help="table file, YAML; see ds_configs/tables/")
    parser.add_argument("--output", required=True, type=Path, help="directory of the runs and of the drawn table")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to N for every row")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of each training on this host")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override for every row")
    arguments = parser.parse_args(argv)
    with report_user_errors():
        table = load_table(arguments.table)
        rows = [
            MethodResults(
                row.method,
                [
                    run_row(table, row, seed, arguments.output, arguments.ranks, arguments.set)
                    for seed in range(1, arguments.seeds + 1)
                ],
            )
            for row in table.rows
        ]
        page, picture = arguments.output / "comparison.html", arguments.output / "comparison.png"
        write_comparison(rows, page, picture, title=table.title)
        print(f"written: {page}, {picture}")
    return 0

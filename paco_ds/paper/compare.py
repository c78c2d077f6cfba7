"""Put runs beside each other, and beside the paper's rows: accuracy by shot and settings that differ.

Runs that differ by seed only are one line, mean ± standard deviation over seeds. A run with the settings of a row of
the paper's tables stands beside that row; --table and --row name others, --no-paper leaves them out. --differences adds
each line's difference in All from the first line, with a bootstrap interval over seeds and test images.

examples:
  paco-compare runs/ce-0 runs/ce-1 runs/paco-0 runs/paco-1
  paco-compare runs/paco-* runs/ce-* --differences
  paco-compare runs/paco --table 13 --output table.tex
  paco-compare runs/mine --table 9 --row 'ResNet-50, PaCo'
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from paco_ds.command import one_line_on_interrupt, report_user_errors, say
from paco_ds.config.load import load_recipe_of_run
from paco_ds.config.parse import brief, read_json
from paco_ds.data.manifest import SHOTS
from paco_ds.errors import DataError, UserError, printable
from paco_ds.files import replace_text
from paco_ds.paper.matching import CORRECTIONS, matching_row
from paco_ds.paper.results import Identity
from paco_ds.paper.tables import Row, load_table
from paco_ds.paper.text_tables import FORMATS

GROUPS = ("all", *SHOTS)
SAME_DATA = {
    "manifest_sha256": "shards (SHA-256 of the manifest)",
    "split": "evaluated split",
    "class_names": "classes",
}


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: its directory.
        seed: of its recipe.
        figures: metrics.json.
        settings: {dotted key: value as text} of what decides the result, but the seed, and of the evaluation.
        identity: {dotted key: value} of what decides the result.
    """

    path: Path
    seed: Any
    figures: Mapping[str, Any]
    settings: Mapping[str, str]
    identity: Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """A line of the comparison: its name, number of seeds, figures in percent by group, settings that differ."""

    name: str
    seeds: int
    percents: Mapping[str, Sequence[float]]
    settings: Mapping[str, str]

    def cells(self, settings: Sequence[str]) -> list[str]:
        """Texts of the line; a dash where there is no figure or no such setting."""
        figures = [_mean_std(self.percents[group]) for group in GROUPS]
        return [self.name, str(self.seeds or "-"), *figures, *(self.settings.get(key, "-") for key in settings)]


def read_finished_run(path: Path) -> Run:
    """A run with its final evaluation.

    Raises:
        UserError: it is not a run, has no metrics.json yet, or a file of it is damaged.
    """
    recipe, final_path = load_recipe_of_run(path), path / "metrics.json"
    if not final_path.is_file():
        raise UserError(f"{final_path} is missing: the run is not finished; paco-evaluate --run {path} writes it")
    final = read_json(final_path, DataError, "; evaluate the run again")
    if not isinstance(final, dict):
        raise DataError(f"{final_path} holds {brief(final)}, not the mapping that a run writes")
    wrong = [g for g in GROUPS if not isinstance(final.get(g, ""), int | float | None)]
    if wrong or any(key not in final for key in SAME_DATA):
        missing = wrong or [key for key in SAME_DATA if key not in final]
        raise DataError(f"{final_path} has no usable {', '.join(missing)}; evaluate the run again")
    corrected = {key: final[key] for key in CORRECTIONS if key in final}
    identity = Identity.of(recipe).settings
    settings = {**identity, **corrected, "scale": final.get("scale", 1.0)}
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in settings.items() if k != "seed"}
    return Run(path, recipe.seed, final, texts, identity)


def compare(runs: Sequence[Run]) -> tuple[list[Line], list[str]]:
    """(lines in the order of the runs, settings that differ between them).

    Raises:
        UserError: runs of other data, split or classes; or one seed twice.
    """
    first = runs[0]
    for run in runs[1:]:
        if differs := [text for key, text in SAME_DATA.items() if run.figures[key] != first.figures[key]]:
            raise UserError(
                f"{run.path} cannot be compared with {first.path}: another {', another '.join(differs)}; "
                f"evaluate both on the same data, or leave one out"
            )
    groups = by_settings(runs)
    for same in groups:
        seen: dict[Any, Path] = {}
        for run in same:
            if run.seed in seen:
                raise UserError(
                    f"{seen[run.seed]} and {run.path} have the same settings and seed {run.seed}: leave one out"
                )
            seen[run.seed] = run.path
    keys = sorted({key for run in runs for key in run.settings})
    differing = [key for key in keys if len({run.settings.get(key) for run in runs}) > 1]
    return [_line(same) for same in groups], differing


def by_settings(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that differ by seed only are together, in the order of the first of each."""
    groups: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(sorted(run.settings.items())), []).append(run)
    return list(groups.values())


def differences(runs: Sequence[Run]) -> list[list[str]]:
    """Rows (line, difference in All from the first line with its interval) for each further line of a comparison.

    Raises:
        UserError: all runs are one line, or two lines have no seed in common.
        DataError: a run does not say which images it classified right.
    """
    from paco_ds.evaluation.correctness import unpacked
    from paco_ds.paper.intervals import paired_difference

    first, *others = by_settings(runs)
    if not others:
        raise UserError("--differences needs runs of two methods or settings: these are seeds of one")

    def correct(same: Sequence[Run]) -> dict[Any, Any]:
        return {run.seed: unpacked(run.figures, str(run.path / "metrics.json")) for run in same}

    name, of_first = _line(first).name, correct(first)
    return [[f"{_line(o).name} - {name}", str(paired_difference(correct(o), of_first))] for o in others]


def paper_lines(table: str, row: str | None = None) -> list[Line]:
    """The paper's figures of a table, a line for each row that has some, or for the one named.

    Raises:
        RecipeError: no such table.
        UserError: no such row with figures; lists those that there are.
    """
    lines = {each.name: _paper_line(Path(table).stem, each) for each in load_table(table).rows if each.paper}
    if row is not None and row not in lines:
        raise UserError(f"table {table} has no row {row!r} with figures of the paper; there are: {'; '.join(lines)}")
    return [lines[row]] if row is not None else list(lines.values())


def matching_lines(runs: Sequence[Run]) -> list[Line]:
    """The paper's figures of the rows that have the settings of these runs, each once."""
    lines: dict[str, Line] = {}
    for run in {tuple(sorted(run.settings.items())): run for run in runs}.values():
        if found := matching_row(run.identity, run.figures):
            line = _paper_line(*found)
            lines[line.name] = line
    return list(lines.values())


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = _parser()
    with one_line_on_interrupt(), report_user_errors():
        arguments = parser.parse_args(argv)
        if arguments.row and not arguments.table:
            parser.error("--row is of a table: name it with --table")
        runs = [read_finished_run(run) for run in arguments.run]
        lines, differing = compare(runs)
        if arguments.table:
            lines += paper_lines(arguments.table, arguments.row)
        elif not arguments.no_paper:
            lines += matching_lines(runs)
        header = ["run", "seeds", *(f"{group.capitalize()}, %" for group in GROUPS), *differing]
        write = FORMATS[arguments.format or _format_of(arguments.output)]
        text = write(header, [[printable(c) for c in line.cells(differing)] for line in lines])
        if arguments.differences:
            text += "\n\n" + write(["runs", "difference in All"], differences(runs))
        if arguments.output is None:
            print(text)
        else:
            say(f"written: {replace_text(arguments.output, text + chr(10))}")
    return 0


def _line(same: Sequence[Run]) -> Line:
    name = same[0].path.resolve().name
    if len(same) > 1:
        name += f" and {len(same) - 1} more"
    percents = {group: _percents([run.figures[group] for run in same]) for group in GROUPS}
    return Line(name, len(same), percents, same[0].settings)


def _paper_line(table: str, row: Row) -> Line:
    fractions = row.paper.fractions() if row.paper else {}
    number = table.removeprefix("table")
    name = f"Table {number}" if number.isdigit() else table
    return Line(f"paper, {name}: {row.name}", 0, {g: _percents([fractions.get(g)]) for g in GROUPS}, {})


def _percents(fractions: Sequence[float | None]) -> list[float]:
    return [100 * fraction for fraction in fractions if fraction is not None]


def _mean_std(percents: Sequence[float]) -> str:
    if not percents:
        return "-"
    return f"{fmean(percents):.1f}" + (f" ± {stdev(percents):.1f}" if len(percents) > 1 else "")


def _format_of(output: Path | None) -> str:
    return {".csv": "csv", ".tex": "latex"}.get(output.suffix if output else "", "markdown")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="+", help="run directory of a finished training")
    beside = parser.add_mutually_exclusive_group()
    beside.add_argument("--table", help="the paper's rows of this table: a number (9 to 14), a name or a path")
    beside.add_argument("--no-paper", action="store_true", help="without the paper's row of the runs' own settings")
    parser.add_argument("--row", help="of --table, this row alone, such as 'ResNet-50, PaCo'")
    parser.add_argument(
        "--differences",
        action="store_true",
        help="add each line's difference in All from the first line, with its 95 %% bootstrap interval",
    )
    parser.add_argument("--format", choices=FORMATS, help="by the ending of --output (.csv, .tex); markdown otherwise")
    parser.add_argument("--output", type=Path, help="file to write; standard output by default")
    return parser


if __name__ == "__main__":
    sys.exit(main())

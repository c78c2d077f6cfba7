"""paco-compare: runs beside each other and beside the paper's rows."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from paco_ds.paper.compare import main, matching_lines, read_finished_run
from paco_ds.paper.matching import FREE, rows_of_the_paper
from paco_ds.paper.tables import load_table
from tests.recipes import write_tiny_recipe


def _run(folder: Path, name: str, seed: int, accuracy: float, *more: str, **other: object) -> str:
    run = folder / name
    run.mkdir()
    method, split = other.pop("method", "paco"), other.pop("train_split", "train")
    write_tiny_recipe(run / "recipe.yaml", f"seed={seed}", f"loss.method={method}", f"data.train_split={split}", *more)
    final = {"seed": seed, "split": "test", "manifest_sha256": "ab", "class_names": ["a", "b"], "few": None}
    final |= {"many": 0.9, "medium": 0.5, "all": accuracy}
    (run / "metrics.json").write_text(json.dumps(final | other))
    return str(run)


def test_seeds_are_one_line_and_differing_settings_are_columns(tmp_path: Path, capsys) -> None:
    """0.80 and 0.84 are 82.0 ± 2.8; what both methods share is not shown."""
    runs = [
        _run(tmp_path, "p0", 0, 0.80),
        _run(tmp_path, "p1", 1, 0.84),
        _run(tmp_path, "ce", 0, 0.7, method="cross_entropy"),
    ]
    assert main([*runs, "--format", "csv"]) == 0
    header, first, second = csv.reader(io.StringIO(capsys.readouterr().out))
    assert header == ["run", "seeds", "All, %", "Many, %", "Medium, %", "Few, %", "loss.method"]
    assert first == ["p0 and 1 more", "2", "82.0 ± 2.8", "90.0 ± 0.0", "50.0 ± 0.0", "-", "paco"]
    assert second == ["ce", "1", "70.0", "90.0", "50.0", "-", "cross_entropy"]


def test_ports_and_processes_part_no_seeds_and_corrections_of_an_evaluation_do(tmp_path: Path, capsys) -> None:
    """What does not decide the result is no column; what an evaluation corrected is one."""
    runs = [
        _run(tmp_path, "p0", 0, 0.80),
        _run(tmp_path, "p1", 1, 0.84, "metrics.port=19777", "data.workers=3"),
        _run(tmp_path, "adjusted", 0, 0.85, logit_adjustment=1.0),
    ]
    assert main([*runs, "--format", "csv"]) == 0
    header, first, second = csv.reader(io.StringIO(capsys.readouterr().out))
    assert header[6:] == ["logit_adjustment"]
    assert (first[1], first[6]) == ("2", "-")
    assert (second[1], second[6]) == ("1", "1.0")


@pytest.mark.parametrize(
    ("ending", "begin"), [(".csv", "run,seeds,"), (".tex", "\\begin{tabular}"), (".md", "| run"), (".txt", "| run")]
)
def test_the_ending_of_a_file_is_its_format(tmp_path: Path, ending: str, begin: str) -> None:
    output = tmp_path / f"table{ending}"
    assert main([_run(tmp_path, "mine", 0, 0.5), "--output", str(output)]) == 0
    assert output.read_text().startswith(begin)


def test_rows_of_the_paper_stand_below(tmp_path: Path, capsys) -> None:
    """Table 13 has rows of the paper; they are named so."""
    assert main([_run(tmp_path, "mine", 0, 0.5), "--table", "13"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| mine ")
    assert len(lines) > 3
    assert all(line.startswith("| paper, Table 13: ") for line in lines[3:])


def _run_of_row(folder: Path, table: str, row: str, *overrides: str, **figures: object) -> str:
    run = folder / f"{len(list(folder.iterdir()))}"
    run.mkdir()
    loaded = load_table(table)
    (found,) = [each for each in loaded.rows if each.name == row]
    (run / "recipe.yaml").write_text(loaded.resolve(found, None, overrides).to_yaml())
    final = {"split": "test", "manifest_sha256": "ab", "class_names": ["a"], "all": 0.5, **figures}
    (run / "metrics.json").write_text(json.dumps(final | dict.fromkeys(("many", "medium", "few"), 0.5)))
    return str(run)


def test_a_run_stands_beside_the_row_that_it_trains(tmp_path: Path, capsys) -> None:
    """Found by its settings; seeds, ranks and loaders are free, and two seeds have one row."""
    runs = [
        _run_of_row(tmp_path, "9", "ResNet-50, PaCo", "seed=1", "step.micro_batches=4", "data.workers=1"),
        _run_of_row(tmp_path, "9", "ResNet-50, PaCo", "seed=2"),
        _run_of_row(tmp_path, "13", "CE"),
    ]
    assert main([*runs, "--format", "csv"]) == 0
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert [row[:6] for row in rows[3:]] == [
        ["paper, Table 9: ResNet-50, PaCo", "-", "57.0", "65.0", "55.7", "38.2"],
        ["paper, Table 13: CE", "-", "48.4", "-", "-", "-"],
    ]
    assert main([*runs, "--no-paper"]) == 0
    assert "paper" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "overrides", "figures"),
    [
        ("ResNet-50, PaCo", ["loss.alpha=0.06"], {}),
        ("ResNet-50, PaCo", [], {"logit_adjustment": 1.0}),
        ("ResNet-50, tau-normalize", [], {}),
    ],
)
def test_a_run_with_other_settings_or_corrections_has_no_row(tmp_path: Path, row, overrides, figures) -> None:
    """A row of tau-normalization is that of a run which was evaluated so."""
    run = read_finished_run(Path(_run_of_row(tmp_path, "9", row, *overrides, **figures)))
    assert matching_lines([run]) == []


def test_the_row_of_a_corrected_evaluation_is_found(tmp_path: Path) -> None:
    run = _run_of_row(tmp_path, "9", "ResNet-50, tau-normalize", tau_normalization=0.7)
    assert [line.name for line in matching_lines([read_finished_run(Path(run))])] == [
        "paper, Table 9: ResNet-50, tau-normalize"
    ]


def test_rows_of_the_paper_have_settings_of_their_own() -> None:
    """So that a run has one row; those that another table repeats have its figures."""
    seen: dict[str, dict[str, float]] = {}
    for table, row, settings in rows_of_the_paper():
        corrections = [option for option in row.evaluate if "tau" in option or "logit" in option]
        fixed = json.dumps([sorted((k, v) for k, v in settings.items() if k not in FREE), corrections])
        figures = row.paper.fractions()
        other = seen.setdefault(fixed, figures)
        assert all(figures[key] == other[key] for key in figures.keys() & other.keys()), (table, row.name)


def test_a_row_is_named_or_refused_with_those_that_there_are(tmp_path: Path, capsys) -> None:
    run = _run(tmp_path, "mine", 0, 0.5)
    assert main([run, "--table", "13", "--row", "PaCo"]) == 0
    assert capsys.readouterr().out.splitlines()[3:][0].startswith("| paper, Table 13: PaCo ")
    with pytest.raises(SystemExit):
        main([run, "--table", "13", "--row", "Paco"])
    said = capsys.readouterr().err
    assert "no row 'Paco'" in said
    assert "CE; " in said


def test_names_are_text_in_every_format(tmp_path: Path, capsys) -> None:
    """Markup of LaTeX and of Markdown in a value stays text."""
    runs = [_run(tmp_path, "a_b", 0, 0.5), _run(tmp_path, "c", 0, 0.5, train_split=r"x|\input{y}")]
    main([*runs, "--format", "latex"])
    latex = capsys.readouterr().out
    assert r"a\_b" in latex
    assert r"x|\textbackslash{}input\{y\}" in latex
    main(runs)
    assert r"x\|" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"manifest_sha256": "cd"}, "another shards"),
        ({"split": "val"}, "another evaluated split"),
        ({"class_names": ["b", "a"]}, "another classes"),
        ({}, "same settings and seed 0"),
        ({"all": "high"}, "no usable all"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused_in_words(tmp_path: Path, capsys, other: dict, said: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main([_run(tmp_path, "one", 0, 0.5), _run(tmp_path, "two", 0, 0.5, **other)])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_what_is_no_finished_run_is_told_with_the_remedy(tmp_path: Path, capsys) -> None:
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    for run, said in ((tmp_path / "none", "not the run directory"), (unfinished, "paco-evaluate --run")):
        with pytest.raises(SystemExit) as ended:
            main([str(run)])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
        write_tiny_recipe(unfinished / "recipe.yaml")

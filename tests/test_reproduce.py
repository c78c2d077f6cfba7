"""Tables: rows as data, refused where they would mislead."""

from pathlib import Path

import pytest

from paco_ds import reproduce
from paco_ds.errors import RecipeError
from paco_ds.recipe_file import load_recipe

SHIPPED = sorted(Path(__file__).parent.parent.glob("ds_configs/tables/*.yaml"))
ROWS = "title: t\nrecipe: r.yaml\nrows:\n"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_row_of_a_shipped_table_is_a_valid_recipe(path):
    """Its overrides fit its recipe."""
    table = reproduce.load_table(path)
    assert table.rows
    for row in table.rows:
        load_recipe(table.recipe, row.set)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ROWS + "  - {method: CE+BS}\n  - {method: CE BS}\n", r"rows share the run folders \['ce-bs'\]"),
        (ROWS + "  - {metod: x}\n", r"metod"),
        ("title: [", r"t.yaml"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path, text, message):
    """With its file, and what is wrong."""
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        reproduce.load_table(tmp_path / "t.yaml")


def test_a_missing_table_is_named(tmp_path):
    """With where others lie."""
    with pytest.raises(RecipeError, match=r"no table at .*x.yaml; .*ds_configs/tables"):
        reproduce.load_table(tmp_path / "x.yaml")


def test_a_row_is_launched_with_its_overrides_and_its_seed(tmp_path, monkeypatch):
    """As a user would type it; also when results are there, which the run itself checks."""
    launched = []
    run = tmp_path / "balanced-softmax-seed2"
    run.mkdir()
    (run / "metrics.json").write_text('{"many": 0.9, "medium": 0.8, "few": null, "all": 0.85}')

    class Done:
        returncode = 0

    monkeypatch.setattr(reproduce.subprocess, "run", lambda command, check: launched.append(command) or Done)
    row = reproduce.Row(method="Balanced Softmax", set=("loss.method=balanced_softmax",))
    table = reproduce.Table(title="t", recipe="r.yaml", rows=(row,))
    result = reproduce.run_row(table, row, 2, tmp_path, 4, ["schedule.epochs=1"])
    assert (result.seed, result.all, result.few) == (2, 0.85, None)
    (command,) = launched
    assert command[1:3] == ["--num_gpus", "4"]
    assert command[-3:] == ["--set=loss.method=balanced_softmax", "--set=seed=2", "--set=schedule.epochs=1"]

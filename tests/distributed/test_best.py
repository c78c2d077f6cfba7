"""The weights that were best on the validation split are what the test split is given."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from paco_ds.checkpoint import Checkpoints, chosen_checkpoint, read_checkpoint
from paco_ds.evaluate import main as evaluate
from paco_ds.metrics.log import read
from paco_ds.recipe_file import load_recipe
from tests.recipes import write_tiny_recipe

EVALUATE = Path(__file__).parents[2] / "paco_ds" / "evaluate.py"
TRAIN = "tests.distributed.training:train"


@pytest.fixture(scope="module")
def finished(pool, striped_shards, tmp_path_factory):
    """A run of 2 ranks at ZeRO-3 whose learning rate does harm, so that the best weights are seldom the last."""
    folder = tmp_path_factory.mktemp("best")
    (folder / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    write_tiny_recipe(
        folder / "tiny.yaml",
        f"data.shards={striped_shards}",
        f"engine.deepspeed={folder / 'zero.json'}",
        "evaluation.checkpoint=best_balanced",
        "schedule.epochs=5",
        "optimizer.lr=0.3",
    )
    pool(2).run(TRAIN, recipe=folder / "tiny.yaml", run=folder / "run")
    return folder / "run"


def validation(run):
    return [line for line in read(run / "metrics.jsonl") if line["kind"] == "evaluation" and line["split"] == "val"]


def test_the_best_weights_are_kept_and_given_the_test_split(finished):
    """Of the step with the best balanced accuracy, the first of equals; the last checkpoint is there as well."""
    best = read_checkpoint(finished / "checkpoints" / "best")
    scores = [line["balanced"] for line in validation(finished)]
    assert len(scores) == 5
    assert best.state["score"] == pytest.approx(max(scores))
    assert best.step == validation(finished)[scores.index(max(scores))]["step"]
    results = json.loads((finished / "metrics.json").read_text())
    assert results["step"] == best.step
    assert chosen_checkpoint(finished, load_recipe(finished / "recipe.yaml")).step == best.step


def test_an_ensemble_of_a_run_with_itself_is_the_run(finished, tmp_path):
    """From the command line, on one rank; the figures are those of the training's end."""
    trained = json.loads((finished / "metrics.json").read_text())
    runs, output = [f"--run={finished}"] * 2, tmp_path / "again.json"
    subprocess.run([sys.executable, EVALUATE, *runs, f"--output={output}"], check=True)
    again = json.loads(output.read_text())
    for name in ("all", "balanced", "macro_f1", "calibration_error"):
        assert again[name] == pytest.approx(trained[name], abs=2e-3), name
    assert again["ensemble"] == [str(finished)] * 2


def test_an_ensemble_belongs_to_no_run(capsys):
    """Where its figures go has to be said."""
    with pytest.raises(SystemExit):
        evaluate(["--run", "a", "--run", "b"])
    assert "--output FILE.json" in capsys.readouterr().err


@pytest.mark.parametrize("criterion", ["last", "best_all"])
def test_the_best_of_another_criterion_is_not_the_best(finished, criterion):
    """The criterion may change when a run goes on; its scores are not compared with those of the one before."""
    recipe = load_recipe(finished / "recipe.yaml", [f"evaluation.checkpoint={criterion}"])
    best = read_checkpoint(finished / "checkpoints" / "best")
    assert Checkpoints(finished, recipe, best.state["manifest_sha256"]).best(until=10**6) is None
    assert chosen_checkpoint(finished, recipe).path.name.startswith("step-")


def test_a_resumed_run_keeps_only_a_best_of_its_past(pool, finished, tmp_path):
    """Stopped before the best step and gone on: that step is taken again, and found the best again."""
    best = read_checkpoint(finished / "checkpoints" / "best")
    run, recipe = tmp_path / "run", finished.parent / "tiny.yaml"
    pool(2).run(TRAIN, recipe=recipe, run=run, stop_at_step=best.step + 1)
    pool(2).run(TRAIN, recipe=recipe, run=run)
    again = read_checkpoint(run / "checkpoints" / "best")
    assert (again.step, again.state["score"]) == (best.step, best.state["score"])

"""The weights that were best on the validation split are what the test split is given."""

import json
from pathlib import Path

import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score
from torchmetrics.functional.classification import multiclass_calibration_error

from paco_ds.checkpoint import Checkpoints, chosen_checkpoint, newest_checkpoint, read_checkpoint
from paco_ds.config.load import load_recipe
from paco_ds.data.manifest import load_manifest, open_data
from paco_ds.errors import RecipeError
from paco_ds.evaluate import main as evaluate
from paco_ds.evaluation.runner import load_recogniser
from paco_ds.evaluation.trained_runs import load_members
from paco_ds.metrics.log import read
from tests.commands import run_command
from tests.pool import RankError
from tests.recipes import evaluation_batches, tiny_recipe, write_tiny_recipe

EVALUATE = "paco_ds.evaluate"
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
    assert chosen_checkpoint(finished, load_recipe(finished / "recipe.yaml").evaluation.checkpoint).step == best.step


def test_an_ensemble_of_a_run_with_itself_is_the_run(finished, tmp_path):
    """From the command line, on one rank; the figures are those of the training's end."""
    trained = json.loads((finished / "metrics.json").read_text())
    runs, output = [f"--run={finished}"] * 2, tmp_path / "again.json"
    run_command(EVALUATE, *runs, f"--output={output}")
    again = json.loads(output.read_text())
    for name in ("all", "balanced", "macro_f1", "calibration_error"):
        assert again[name] == pytest.approx(trained[name], abs=2e-3), name
    assert again["ensemble"] == [str(finished)] * 2


def test_an_ensemble_of_two_runs_averages_their_probabilities(pool, striped_shards, tmp_path):
    """The figures are those of the mean of both models' probabilities: of neither alone, and not of mean logits."""
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    write_tiny_recipe(
        tmp_path / "tiny.yaml",
        f"data.shards={striped_shards}",
        f"engine.deepspeed={tmp_path / 'zero.json'}",
        "loss.method=cross_entropy",
        "model.backbone=cifar_resnet20",
        "evaluation.checkpoint=last",
    )
    runs, of_each = [tmp_path / "first", tmp_path / "second"], []
    for seed, run in enumerate(runs):
        overrides = (f"seed={seed}", f"optimizer.lr={0.05 / (seed + 1)}")  # one surer than the other
        pool(1).run(TRAIN, recipe=tmp_path / "tiny.yaml", run=run, overrides=overrides, stop_at_step=6 - seed)
        labels, logits = logits_on_test(run)
        of_each.append(logits)
    output = tmp_path / "ensemble.json"
    run_command(EVALUATE, *(f"--run={run}" for run in runs), f"--output={output}")
    written = json.loads(output.read_text())
    assert written["ensemble"] == [str(run) for run in runs]
    expected = figures(labels, torch.stack([logits.softmax(1) for logits in of_each]).mean(0))
    for name, value in expected.items():
        assert written[name] == pytest.approx(value, abs=1e-5), name
    for other in (*(logits.softmax(1) for logits in of_each), torch.stack(of_each).mean(0).softmax(1)):
        assert figures(labels, other)["calibration_error"] != pytest.approx(expected["calibration_error"], abs=1e-3)


def logits_on_test(run):
    """(labels [N], logits [N, C] in float64) of a run's newest checkpoint."""
    recipe = load_recipe(run / "recipe.yaml")
    manifest = open_data(recipe.data, ["test"])
    model = load_recogniser(newest_checkpoint(run), recipe, manifest).eval()
    with torch.no_grad():
        batches = [
            (b.labels[b.valid], model(b.query).logits[b.valid]) for b in evaluation_batches(recipe, manifest, "test")
        ]
    labels, logits = zip(*batches, strict=True)
    return torch.cat(labels), torch.cat(logits).double()


def figures(labels, probabilities):
    """Of probabilities [N, C], by scikit-learn and torchmetrics."""
    predicted = probabilities.argmax(1)
    return {
        "all": accuracy_score(labels, predicted),
        "balanced": balanced_accuracy_score(labels, predicted),
        "macro_f1": f1_score(labels, predicted, average="macro"),
        "calibration_error": float(multiclass_calibration_error(probabilities, labels, num_classes=4, n_bins=15)),
    }


def test_an_ensemble_belongs_to_no_run(capsys):
    """Where its figures go has to be said."""
    with pytest.raises(SystemExit):
        evaluate(["--run", "a", "--run", "b"])
    assert "--output FILE.json" in capsys.readouterr().err


def test_runs_with_other_views_are_no_ensemble(striped_shards):
    """All members see the views of the first run."""
    recipes = [tiny_recipe(), tiny_recipe("views.evaluation.resize=14")]
    with pytest.raises(RecipeError, match=r"views\.evaluation\.resize is 12 in a and 14 in b, .* --set views\.ev"):
        load_members([Path("a"), Path("b")], recipes, load_manifest(striped_shards))


def test_best_weights_that_not_all_ranks_can_read_are_refused(pool, finished):
    """The test split would be given two models."""
    arguments = {"recipe": finished.parent / "tiny.yaml", "run": finished}
    with pytest.raises(RankError, match=r"different checkpoints in .*\(rank 0: step \d+ \(\w{8}\), rank 1: none\)"):
        pool(2).run("tests.distributed.training:train_without_best", **arguments)


@pytest.mark.parametrize("criterion", ["last", "best_all"])
def test_the_best_of_another_criterion_is_not_the_best(finished, criterion):
    """The criterion may change when a run goes on; its scores are not compared with those of the one before."""
    recipe = load_recipe(finished / "recipe.yaml", [f"evaluation.checkpoint={criterion}"])
    best = read_checkpoint(finished / "checkpoints" / "best")
    assert Checkpoints(finished, recipe, best.state["manifest_sha256"]).best(until=10**6) is None
    assert chosen_checkpoint(finished, recipe.evaluation.checkpoint).path.name.startswith("step-")


def test_a_resumed_run_keeps_only_a_best_of_its_past(pool, finished, tmp_path):
    """Stopped before the best step and gone on: that step is taken again, and found the best again."""
    best = read_checkpoint(finished / "checkpoints" / "best")
    run, recipe = tmp_path / "run", finished.parent / "tiny.yaml"
    pool(2).run(TRAIN, recipe=recipe, run=run, stop_at_step=best.step + 1)
    pool(2).run(TRAIN, recipe=recipe, run=run)
    again = read_checkpoint(run / "checkpoints" / "best")
    assert (again.step, again.state["score"]) == (best.step, best.state["score"])

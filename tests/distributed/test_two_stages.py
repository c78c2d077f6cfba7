"""A classifier trained anew, or scaled, on the frozen backbone of a first stage; and normalised without training."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from paco_ds.checkpoint import newest_checkpoint
from tests.pool import RankError
from tests.recipes import write_tiny_recipe

EVALUATE = Path(__file__).parents[2] / "paco_ds" / "evaluate.py"
TRAIN = "tests.distributed.training:train"


@pytest.fixture(scope="module")
def recipe(striped_shards, tmp_path_factory):
    path = tmp_path_factory.mktemp("stages") / "tiny.yaml"
    for stage in (1, 3):
        (path.parent / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    write_tiny_recipe(
        path,
        f"data.shards={striped_shards}",
        "engine.deepspeed=zero1.json",
        "loss.method=cross_entropy",
        "evaluation.checkpoint=last",
    )
    return path


@pytest.fixture(scope="module")
def first_stage(pool, recipe):
    pool(2).run(TRAIN, recipe=recipe, run=recipe.parent / "first")
    return recipe.parent / "first"


def weights(run):
    return newest_checkpoint(run).model()


def second_stage(recipe, first_stage, trained, stage=1):
    return (
        f"model.start_from={first_stage}",
        f"model.trained={trained}",
        "loss.method=balanced_softmax",
        f"engine.deepspeed={recipe.parent / f'zero{stage}.json'}",
    )


@pytest.mark.parametrize(("trained", "stage"), [("centers", 3), ("center_scales", 1)])
def test_the_second_stage_leaves_the_backbone_as_it_was(pool, recipe, first_stage, tmp_path, trained, stage):
    """Weights and BatchNorm's statistics bit for bit, with three micro-batches and resumed; what is trained moved."""
    overrides = (*second_stage(recipe, first_stage, trained, stage), "step.micro_batches=3")
    pool(1).run(TRAIN, recipe=recipe, run=tmp_path / "run", overrides=overrides, stop_at_step=3)
    pool(1).run(TRAIN, recipe=recipe, run=tmp_path / "run", overrides=overrides)
    before, after = weights(first_stage), weights(tmp_path / "run")
    for name, value in before.items():
        if name.startswith("query_encoder."):
            assert torch.equal(after[name], value), name
    if trained == "centers":
        assert not torch.allclose(after["centers.weight"], before["centers.weight"], atol=1e-3)
    else:
        assert torch.equal(after["centers.linear.weight"], before["centers.weight"])
        assert not torch.allclose(after["centers.scale"], torch.ones(4), atol=1e-4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.start_from=/nowhere/run", "is no trained run"),
        ("model.width=6", "trained with another network: width 4 there, 6 here"),
        ("model.backbone=cifar_resnet32", "backbone 'cifar_resnet20' there, 'cifar_resnet32' here"),
    ],
)
def test_a_first_stage_that_does_not_fit_is_refused_in_words(pool, recipe, first_stage, tmp_path, override, message):
    """Missing, or of another backbone."""
    overrides = (*second_stage(recipe, first_stage, "centers"), override)
    with pytest.raises(RankError) as error:
        pool(1).run(TRAIN, recipe=recipe, run=tmp_path / "run", overrides=overrides)
    assert message in str(error.value)


def test_tau_is_chosen_on_validation_and_normalises_the_centers(first_stage, tmp_path):
    """From the command line; at tau 0 nothing but the bias is lost."""
    output = tmp_path / "tau.json"
    command = [sys.executable, EVALUATE, f"--run={first_stage}", f"--output={output}", "--tau-normalize=auto"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "balanced accuracy on val 0.0: " in done.stdout
    results = json.loads(output.read_text())
    chosen = float(done.stdout.split("tau ")[1].split(":")[0])
    assert results["tau_normalization"] == chosen
    scores = {
        float(t.split(": ")[0]): float(t.split(": ")[1])
        for t in done.stdout.split("val ")[1].split("\n")[0].split(", ")
    }
    assert scores[chosen] == max(scores.values())

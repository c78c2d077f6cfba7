"""evaluation.weights on real ranks: the average follows the weights exactly, is resumed, and is what is evaluated."""

import json
import shutil

import pytest
import torch

from paco_ds.checkpoint import newest_checkpoint
from paco_ds.config.load import load_recipe
from paco_ds.errors import CheckpointError
from paco_ds.evaluation.predictor import load
from paco_ds.models.weight_names import source_of
from paco_ds.training.weight_average import ema_decay
from tests.models.tiny_networks import of
from tests.pool import RankError
from tests.recipes import write_tiny_recipe

TRAIN = "tests.distributed.training:train"
EMA = ("evaluation.weights=ema", "evaluation.ema_decay=0.15")
PLAIN = ("loss.method=cross_entropy", *EMA)


@pytest.mark.parametrize(("world_size", "stage"), [(1, 0), (2, 1), (2, 3)])
def test_the_average_is_that_of_the_weights_after_each_step(pool, world_size, stage):
    """In float64 from the weights of three runs, of one, two and three steps; BatchNorm's statistics too."""
    runs = [
        pool(world_size).run("tests.distributed.runs:run_steps", stage=stage, steps=n, overrides=EMA)[0]
        for n in (1, 2, 3)
    ]
    names = [name for name in runs[0].before if name.startswith("average.")]
    assert any(name.endswith("running_var") for name in names)
    for name in names:
        average = runs[0].before[name]
        assert torch.equal(average, runs[0].before[source_of(name)])
        if not average.is_floating_point():
            assert torch.equal(runs[2].after[name], runs[2].after[source_of(name)])
            continue
        average = average.double()
        for n, decay in enumerate((0.1, 0.15, 0.15)):
            average = decay * average + (1 - decay) * runs[n].after[source_of(name)].double()
        torch.testing.assert_close(runs[2].after[name].double(), average, rtol=1e-5, atol=1e-6)
    assert not torch.equal(runs[2].after["average.centers.weight"], runs[2].after["centers.weight"])


def test_a_network_without_counters_has_an_average(pool):
    """Nor running statistics: a ViT."""
    overrides = (*of("vit"), "loss.method=cross_entropy", *EMA)
    (outcome,) = pool(1).run("tests.distributed.runs:run_steps", steps=1, overrides=overrides)
    before, after = outcome.before["average.centers.weight"], outcome.after["average.centers.weight"]
    torch.testing.assert_close(after, before.lerp(outcome.after["centers.weight"], 0.9))
    assert not torch.equal(after, before)


def test_the_decay_rises_to_the_setting():
    """TensorFlow's warm-up."""
    assert [ema_decay(0.9999, step) for step in (0, 1, 90)] == [1 / 10, 2 / 11, 91 / 100]
    assert ema_decay(0.9999, 10**6) == 0.9999


@pytest.fixture(scope="module")
def averaged(pool, striped_shards, tmp_path_factory):
    """A run of cross-entropy on two ranks at stage 3, with an average."""
    folder = tmp_path_factory.mktemp("averaged")
    (folder / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    where = (f"data.shards={striped_shards}", "engine.deepspeed=zero.json", "schedule.epochs=1")
    write_tiny_recipe(folder / "tiny.yaml", *where, *PLAIN)
    pool(2).run(TRAIN, recipe=folder / "tiny.yaml", run=folder / "run")
    return folder


def test_a_resumed_run_has_the_same_average(pool, averaged, tmp_path):
    """Bit for bit on the same ranks, to rounding on another number of them."""
    whole = newest_checkpoint(averaged / "run").model()
    for ranks, tolerance in ((2, 0.0), (1, 1e-5)):
        run = tmp_path / f"{ranks}"
        pool(2).run(TRAIN, recipe=averaged / "tiny.yaml", run=run, stop_at_step=2)
        pool(ranks).run(TRAIN, recipe=averaged / "tiny.yaml", run=run)
        for name, tensor in newest_checkpoint(run).model().items():
            torch.testing.assert_close(tensor, whole[name], rtol=tolerance, atol=tolerance, msg=name)


def test_the_average_is_evaluated_and_predicted_with(averaged):
    """metrics.json is of the weights that `load` gives, and names them; the trained weights on request."""
    weights = newest_checkpoint(averaged / "run").model()
    assert json.loads((averaged / "run" / "metrics.json").read_text())["weights"] == "ema"
    model, plain = load(averaged / "run"), load(averaged / "run", weights="query")
    assert torch.equal(model.recogniser.state_dict()["centers.weight"], weights["average.centers.weight"])
    assert torch.equal(plain.recogniser.state_dict()["centers.weight"], weights["centers.weight"])
    assert model.digest != plain.digest
    assert not any(name.startswith("average.") for name in model.recogniser.state_dict())


def test_a_run_without_an_average_is_refused_by_name(pool, averaged, tmp_path):
    """By its predictor and when it is resumed."""
    shutil.copy(averaged / "zero.json", tmp_path)
    recipe = load_recipe(averaged / "tiny.yaml", ["evaluation.weights=query"])
    (tmp_path / "tiny.yaml").write_text(recipe.to_yaml())
    pool(1).run(TRAIN, recipe=tmp_path / "tiny.yaml", run=tmp_path / "run", stop_at_step=1)
    message = r"evaluation\.weights ema: .*step-00000001 has no average, .* set it to query"
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "run", weights="ema")
    with pytest.raises(RankError, match=message):
        pool(1).run(TRAIN, recipe=tmp_path / "tiny.yaml", run=tmp_path / "run", overrides=EMA)

"""A run that learns from a finished one: at every ZeRO stage, on two ranks as on one, and after a stop."""

import json

import pytest
import torch

from paco_ds.checkpoint import Checkpoints, newest_checkpoint
from paco_ds.checkpoint.read import STATE_DIGEST, state_digest
from paco_ds.config.load import load_recipe
from paco_ds.data.manifest import open_data
from paco_ds.distributed.zero import plain_states
from paco_ds.errors import RecipeError
from paco_ds.metrics.log import read
from paco_ds.training.build import Classes, build_model
from paco_ds.training.optimizer import make_optimizer
from paco_ds.training.teacher import Teacher
from tests.pool import RankError
from tests.recipes import write_tiny_recipe

TRAIN = "tests.distributed.training:train"
RIDE = ("loss.method=ride", "model.centers=cosine")


@pytest.fixture(scope="module")
def recipe(striped_shards, tmp_path_factory):
    path = tmp_path_factory.mktemp("distilled") / "tiny.yaml"
    for stage in range(4):
        (path.parent / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    write_tiny_recipe(path, f"data.shards={striped_shards}", "engine.deepspeed=zero1.json", "step.micro_batches=2")
    return path


@pytest.fixture(scope="module")
def teacher(pool, recipe):
    """RIDE with more experts than its pupil."""
    pool(2).run(TRAIN, recipe=recipe, run=recipe.parent / "teacher", overrides=(*RIDE, "model.experts=3"))
    return recipe.parent / "teacher"


def taught(recipe, teacher, *overrides, stage=0):
    settings = overrides or (*RIDE, "model.experts=2")
    zero = f"engine.deepspeed={recipe.parent / f'zero{stage}.json'}"
    return (*settings, f"loss.distill={{teacher: {teacher}, weight: 2, temperature: 1.5}}", zero)


def steps(run):
    return [line for line in read(run / "metrics.jsonl") if line["kind"] == "step"]


@pytest.fixture(scope="module")
def alone(pool, recipe, teacher):
    """Two steps of one rank without ZeRO."""
    run = recipe.parent / "alone"
    pool(1).run(TRAIN, recipe=recipe, run=run, overrides=taught(recipe, teacher), stop_at_step=2)
    return run


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_are_taught_as_one(pool, recipe, teacher, alone, tmp_path, stage):
    """Losses and the teacher's term, shown beside the method's parts; the teacher itself is no part of the run."""
    arguments = {"recipe": recipe, "run": tmp_path / "run", "overrides": taught(recipe, teacher, stage=stage)}
    pool(2).run(TRAIN, **arguments, stop_at_step=2)
    for two, one in zip(steps(tmp_path / "run"), steps(alone), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert two["parts"] == pytest.approx(one["parts"], abs=1e-5)
        base, diversity, distillation = (one["parts"][name] for name in ("base", "diversity", "distillation"))
        assert one["loss"] == pytest.approx(base - 0.2 * diversity + 2 * distillation, rel=1e-5)
        assert distillation > 0
    assert newest_checkpoint(tmp_path / "run").model().keys() == newest_checkpoint(alone).model().keys()
    assert not any(".experts.2." in name for name in newest_checkpoint(alone).model())


def test_a_taught_run_resumes_bit_equal(pool, recipe, teacher, tmp_path):
    """On 2 ranks at ZeRO-1."""
    found = []
    for name, stops in (("straight", (6,)), ("resumed", (2, 6))):
        run = tmp_path / name
        for stop in stops:
            pool(2).run(TRAIN, recipe=recipe, run=run, overrides=taught(recipe, teacher, stage=1), stop_at_step=stop)
        found.append(([line["loss"] for line in steps(run)], newest_checkpoint(run).model()))
    (losses, model), (resumed_losses, resumed) = found
    assert resumed_losses == losses
    assert len(losses) == 6
    assert all(torch.equal(resumed[name], value) for name, value in model.items())


@pytest.mark.parametrize(
    "overrides",
    [("loss.method=paco",), ("loss.method=paco", "key_encoder=none"), ("loss.method=cross_entropy", "step.mixup=0.4")],
    ids=["keys", "two_views", "mixed"],
)
def test_any_method_of_centers_can_be_taught(pool, recipe, teacher, tmp_path, overrides):
    """The teacher sees what the student saw: both views, or mixed images."""
    pool(1).run(TRAIN, recipe=recipe, run=tmp_path, overrides=taught(recipe, teacher, *overrides), stop_at_step=1)
    (step,) = steps(tmp_path)
    assert step["parts"]["distillation"] > 0


@pytest.mark.parametrize("who", ["missing", "of other shards"])
def test_a_teacher_that_does_not_fit_is_refused_in_words(recipe, teacher, tmp_path, who):
    """Named, with what to do."""
    run, message = tmp_path / "nobody", "is no trained run"
    if who == "of other shards":
        run, message = tmp_path / "stranger", "was trained on other shards than data.shards"
        checkpoint = run / "checkpoints" / newest_checkpoint(teacher).path.name
        checkpoint.mkdir(parents=True)
        for file in newest_checkpoint(teacher).path.iterdir():
            (checkpoint / file.name).write_bytes(file.read_bytes())
        (run / "recipe.yaml").write_bytes((teacher / "recipe.yaml").read_bytes())
        state = json.loads((checkpoint / "state.json").read_text())
        state["manifest_sha256"] = "0" * 64
        (checkpoint / "state.json").write_text(json.dumps(state | {STATE_DIGEST: state_digest(state)}))
    settings = load_recipe(recipe, taught(recipe, run))
    assert settings.loss.distill
    with pytest.raises(RecipeError, match=f"loss.distill.teacher {run} {message}"):
        Teacher(settings.loss.distill, open_data(settings.data, ["train"]), torch.device("cpu"))


def test_another_teacher_is_refused_on_resume(pool, recipe, alone):
    """Which run teaches is a matter of its weights, wherever they lie; other weights make another run."""
    with pytest.raises(RankError) as error:
        pool(1).run(TRAIN, recipe=recipe, run=alone, overrides=taught(recipe, alone))
    assert "was taught by other weights" in str(error.value)


def test_an_imported_run_can_be_taught(pool, recipe, teacher, tmp_path):
    """Its checkpoint of step 0 was taught by nobody, in no precision."""
    settings = load_recipe(recipe, taught(recipe, teacher))
    manifest = open_data(settings.data, [])
    model = build_model(settings, Classes.of(manifest, settings.data.train_split))
    states = plain_states(make_optimizer(model, settings.optimizer, settings.lr, whole=True), model)
    about = {"autocast": False, "teacher_sha256": None}
    Checkpoints(tmp_path, settings, manifest.sha256).save(0, model.state_dict().items(), states, None, about)
    assert pool(1).run(TRAIN, recipe=recipe, run=tmp_path, overrides=taught(recipe, teacher), stop_at_step=1) == [1]


def test_a_replayed_step_is_taught_and_skipped_as_it_was(pool, recipe, teacher, tmp_path):
    """With the teacher's term, and for its gradient norm, which is beyond what was usual in the run."""
    arguments = {"recipe": recipe, "run": tmp_path / "run", "overrides": taught(recipe, teacher)}
    (again,) = pool(1).run("tests.distributed.training:replayed_outlier", **arguments)
    assert again["skipped"] == "outlier"
    assert again["ratio"] > 1e6
    assert again["distillation"] > 0

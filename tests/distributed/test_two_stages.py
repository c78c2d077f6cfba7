"""A classifier trained anew, or scaled, on the frozen backbone of a first stage; and normalised without training."""

import json

import pytest
import torch

from paco_ds.checkpoint import Checkpoints, newest_checkpoint
from paco_ds.config.load import load_recipe
from paco_ds.data.manifest import open_data
from paco_ds.errors import RecipeError
from paco_ds.evaluation.choose_tau import TAUS
from paco_ds.evaluation.runner import load_recogniser
from paco_ds.metrics.log import read
from paco_ds.training.initial_weights import freeze, load_initial_weights
from tests.commands import run_command
from tests.pool import RankError
from tests.recipes import evaluation_batches, model_of, write_tiny_recipe

EVALUATE = "paco_ds.evaluate"
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


def test_batch_norm_of_a_frozen_backbone_goes_on_averaging_where_it_is_asked_to(pool, recipe, first_stage, tmp_path):
    """As the published code of cRT does: weights stay, statistics move, on 2 ranks as on one."""
    overrides = (*second_stage(recipe, first_stage, "centers", 3), "model.frozen_batch_norm=training")
    for ranks in (1, 2):
        pool(ranks).run(TRAIN, recipe=recipe, run=tmp_path / f"{ranks}", overrides=overrides, stop_at_step=3)
    before, one, two = weights(first_stage), weights(tmp_path / "1"), weights(tmp_path / "2")
    encoder = [name for name in before if name.startswith("query_encoder.")]
    statistics = {name for name in encoder if "running" in name or "num_batches" in name}
    assert {name for name in encoder if not torch.equal(before[name], two[name])} == statistics
    for name in encoder:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("trained", "stage"), [("centers", 1), ("center_scales", 3)])
def test_the_second_stage_resumes_bit_equal_on_two_ranks(pool, recipe, first_stage, tmp_path, trained, stage):
    """cRT and LWS, stopped in mid-epoch: weights, momentum and losses of the run without a stop; the backbone's are the
    first stage's, and have no momentum."""
    overrides = second_stage(recipe, first_stage, trained, stage)
    found = []
    for run, stops in (("straight", (6,)), ("resumed", (3, 6))):
        for stop in stops:
            pool(2).run(TRAIN, recipe=recipe, run=tmp_path / run, overrides=overrides, stop_at_step=stop)
            assert newest_checkpoint(tmp_path / run).step == stop
        checkpoint = newest_checkpoint(tmp_path / run)
        losses = [line["loss"] for line in read(tmp_path / run / "metrics.jsonl") if line["kind"] == "step"]
        found.append(
            (
                checkpoint.model(),
                {name.removeprefix("momentum_buffer."): t for name, t in checkpoint.optimizer().items()},
                losses,
            )
        )
    (model, momentum, losses), (model_again, momentum_again, losses_again) = found
    assert len(losses) == 6
    assert losses_again == losses
    for straight, again in ((model, model_again), (momentum, momentum_again)):
        assert straight.keys() == again.keys()
        for name, value in straight.items():
            assert torch.equal(again[name], value), name
    assert momentum.keys() == ({"centers.weight", "centers.bias"} if trained == "centers" else {"centers.scale"})
    assert all(value.any() for value in momentum.values())
    before = weights(first_stage)
    assert all(torch.equal(model[name], value) for name, value in before.items() if name.startswith("query_encoder."))
    pool(1).run(TRAIN, recipe=recipe, run=tmp_path / "one", overrides=overrides, stop_at_step=6)
    alone = newest_checkpoint(tmp_path / "one").model()
    for name in momentum:
        torch.testing.assert_close(model[name], alone[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.start_from=/nowhere/run", "is no trained run"),
        ("model.width=6", "trained with another network: width 4 there, 6 here"),
        ("model.backbone=cifar_resnet32", "backbone 'cifar_resnet8' there, 'cifar_resnet32' here"),
    ],
)
def test_a_first_stage_that_does_not_fit_is_refused_in_words(pool, recipe, first_stage, tmp_path, override, message):
    """Missing, or of another backbone."""
    overrides = (*second_stage(recipe, first_stage, "centers"), override)
    with pytest.raises(RankError) as error:
        pool(1).run(TRAIN, recipe=recipe, run=tmp_path / "run", overrides=overrides)
    assert message in str(error.value)


@pytest.fixture
def long_centers(pool, recipe, tmp_path):
    """A run whose centers are the longer the more frequent their class, 27 to 1: of use again with a tau above 0."""
    run = tmp_path / "long"
    pool(1).run(TRAIN, recipe=recipe, run=run, overrides=("schedule.epochs=12",))
    checkpoint, settings = newest_checkpoint(run), load_recipe(run / "recipe.yaml")
    model = checkpoint.model()
    length = torch.tensor([27.0, 9.0, 3.0, 1.0])[:, None]
    model["centers.weight"] = length * torch.nn.functional.normalize(model["centers.weight"], dim=1)
    about = {"autocast": checkpoint.state["autocast"]}
    checkpoints = Checkpoints(run, settings, checkpoint.state["manifest_sha256"])
    checkpoints.save(checkpoint.step + 1, model.items(), checkpoint.optimizer().items(), None, about)
    return run


def test_tau_is_chosen_on_validation_and_normalises_the_centers(pool, long_centers, tmp_path):
    """From the command line: every balanced accuracy that it chose by is that of an evaluation of the validation split
    at this tau, the figures of the test split are those at the chosen one, and 2 ranks choose as one."""
    output = tmp_path / "tau.json"
    done = run_command(EVALUATE, f"--run={long_centers}", f"--output={output}", "--tau-normalize=auto")
    assert "balanced accuracy on val 0.0: " in done.stdout
    chosen = float(done.stdout.split("tau ")[1].split(":")[0])
    printed = {
        float(t.split(": ")[0]): float(t.split(": ")[1])
        for t in done.stdout.split("val ")[1].split("\n")[0].split(", ")
    }

    def evaluated(split, tau):
        arguments = {"run": long_centers, "output": tmp_path / "again.json", "split": split, "tau": tau}
        return pool(1).run("tests.distributed.evaluating:written", **arguments)[0]

    scores = {tau: evaluated("val", tau)["balanced"] for tau in TAUS}
    assert scores[0.0] < scores[chosen]
    assert chosen == max(TAUS, key=lambda tau: scores[tau])
    assert printed == pytest.approx(scores, abs=6e-4)
    results, expected = json.loads(output.read_text()), evaluated("test", chosen)
    assert results["tau_normalization"] == chosen
    for name in ("all", "balanced", "macro_f1", "calibration_error"):
        assert results[name] == pytest.approx(expected[name]), name
    for world_size in (1, 2):
        of_ranks = pool(world_size).run("tests.distributed.evaluating:scores_of_taus", run=long_centers, split="val")
        assert of_ranks == [(chosen, pytest.approx(scores))] * world_size


def test_post_hoc_logit_adjustment_is_chosen_on_validation_and_holds_on_test(pool, long_centers, tmp_path):
    """The figures are those of logits less tau log pi at the tau that validation chose."""
    output = tmp_path / "adjusted.json"
    done = run_command(EVALUATE, f"--run={long_centers}", f"--output={output}", "--logit-adjust=auto")
    chosen = float(done.stdout.split("tau ")[1].split(":")[0])
    assert chosen > 0
    assert done.stdout.count(", 2.0: ") == 1
    results = json.loads(output.read_text())
    arguments = {"run": long_centers, "output": tmp_path / "again.json", "split": "test", "adjusted": chosen}
    expected = pool(1).run("tests.distributed.evaluating:written", **arguments)[0]
    assert results["logit_adjustment"] == chosen
    for name in ("all", "balanced", "macro_f1", "calibration_error"):
        assert results[name] == pytest.approx(expected[name]), name


EXPERTS = ("model.experts=3", "model.centers=cosine", "loss.method=ride")
ROUTERS = (
    "model.trained=routers",
    "loss.method=routing",
    "loss.routing.positive_weight=1",
    "data.sampler=class_balanced",
    "optimizer.lr=0.002",
    "evaluation.batch=2",  # small enough that an expert has no image on some rank
)


@pytest.fixture(scope="module")
def experts(pool, recipe):
    """A run of RIDE with three experts."""
    pool(2).run(TRAIN, recipe=recipe, run=recipe.parent / "experts", overrides=EXPERTS)
    return recipe.parent / "experts"


def test_weights_of_experts_are_learned_on_test_images_without_labels(pool, experts, tmp_path):
    """From the command line, with the accuracy of each simulated test distribution; two ranks learn what one does."""
    output = tmp_path / "aggregated.json"
    done = run_command(EVALUATE, f"--run={experts}", f"--output={output}", "--aggregate-experts")
    assert "weights of the experts, learned on test without labels: 0." in done.stdout
    results, plain = json.loads(output.read_text()), json.loads((experts / "metrics.json").read_text())
    assert results["aggregation"] == "prediction stability"
    assert results["test_agnostic"].keys() == plain["test_agnostic"].keys()
    learned = results["expert_weights"]
    assert all(sum(weights) == pytest.approx(1) for weights in learned.values())
    assert max(abs(weight - 1 / 3) for weight in learned["as it is"]) > 1e-4
    for world_size in (1, 2):
        arguments = {"run": experts, "split": "test"}
        for of_rank in pool(world_size).run("tests.distributed.evaluating:weights_of_experts", **arguments):
            assert of_rank == {name: pytest.approx(weights, abs=1e-6) for name, weights in learned.items()}


def routing(experts, stage=1):
    zero = f"engine.deepspeed={experts.parent / f'zero{stage}.json'}"
    return (*EXPERTS, *ROUTERS, f"model.start_from={experts}", zero)


def at_threshold(run, tmp_path, threshold):
    """(what evaluate.py writes on one rank, what it prints)."""
    output = tmp_path / f"at-{threshold}.json"
    override = f"--set=model.routers.threshold={threshold!r}"
    done = run_command(EVALUATE, f"--run={run}", f"--output={output}", override)
    return json.loads(output.read_text()), done.stdout


@pytest.fixture(scope="module")
def routed(pool, recipe, experts):
    """Routers on these experts, by 2 ranks at ZeRO-3, whose batches of 2 give each expert other numbers of images."""
    run = recipe.parent / "routed"
    pool(2).run(TRAIN, recipe=recipe, run=run, overrides=routing(experts, stage=3))
    return run


def test_routers_leave_the_experts_as_they_were_and_resume_bit_equal(pool, recipe, experts, routed, tmp_path):
    """Backbone, BatchNorm and centers bit for bit, at ZeRO-3 on 2 ranks; a stopped run is the run without a stop."""
    before, after = weights(experts), weights(routed)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    trained = sorted(after.keys() - before.keys())
    assert {name.split(".")[0] for name in trained} == {"routers"}
    for stop in (3, None):
        pool(2).run(TRAIN, recipe=recipe, run=tmp_path / "run", overrides=routing(experts, 3), stop_at_step=stop)
    resumed = weights(tmp_path / "run")
    assert all(torch.equal(resumed[name], value) for name, value in after.items())


def a_threshold_that_halves(run):
    """Midway between the images of the test split, as the first router orders them."""
    recipe = load_recipe(run / "recipe.yaml")
    manifest = open_data(recipe.data, ["test"])
    model = load_recogniser(newest_checkpoint(run), recipe, manifest)
    freeze(model, recipe.model)
    with torch.no_grad():
        said = [model.train()(b.query).routers[0][b.valid] for b in evaluation_batches(recipe, manifest, "test", 0, 1)]
    return float(torch.cat(said).sigmoid().quantile(0.5))


def test_routed_evaluation_is_the_same_on_any_ranks_and_says_what_it_used(pool, recipe, experts, routed, tmp_path):
    """Half of the images go on to the second expert: figures of 2 ranks at ZeRO-3 are those of one rank without; at
    threshold 0 all figures are the first stage's."""
    threshold = a_threshold_that_halves(routed)
    overrides = (*routing(experts, stage=3), f"model.routers.threshold={threshold!r}")
    pool(2).run(TRAIN, recipe=recipe, run=routed, overrides=overrides)  # finished before: evaluates once more
    two = json.loads((routed / "metrics.json").read_text())
    one, _ = at_threshold(routed, tmp_path, threshold)
    assert two["images_by_experts"][0] == 10
    assert sum(two["images_by_experts"]) == 20
    for name in ("all", "per_class", "images_by_experts", "experts_used", "macro_f1"):
        assert one[name] == pytest.approx(two[name]), name
    everyone, printed = at_threshold(routed, tmp_path, 0.0)
    assert "3.00 of 3 experts an image" in printed
    first = json.loads((experts / "metrics.json").read_text())
    assert everyone["images_by_experts"] == [0, 0, 20]
    assert everyone["per_class"] == pytest.approx(first["per_class"])
    assert "experts_used" not in first


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.start_from=/nowhere/run",), "is no trained run"),
        (("model.experts=2",), "trained with another network: experts 3 there, 2 here"),
        (("model.centers=linear",), "trained with another network: centers 'cosine' there, 'linear' here"),
        (("model.start_from=/nowhere/weights.pth",), "routers needs trained centers too"),
    ],
)
def test_routers_of_other_experts_are_refused_in_words(recipe, experts, overrides, message):
    """Missing, of another number of experts or kind of centers, or without centers."""
    settings = load_recipe(recipe, (*routing(experts), *overrides))
    model = model_of(settings, 4)
    with pytest.raises(RecipeError, match=message):
        load_initial_weights(model, settings.model)

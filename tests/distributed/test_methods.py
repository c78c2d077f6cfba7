"""Every method takes its steps on two ranks under DeepSpeed as on one, at one ZeRO stage each; a quarter of them is
resumed. `make soak` has every method at every stage, and resumes all.
"""

import json
from pathlib import Path

import pytest
import torch

from paco_ds.checkpoint import newest_checkpoint
from paco_ds.config.methods import METHODS
from paco_ds.metrics.log import read
from tests.distributed.runs import Outcome
from tests.distributed.test_step import FLOAT32, check, update_difference
from tests.recipes import write_tiny_recipe

STEPS = 2
SMALL = ("step.micro_batch=4", "step.micro_batches=2")
EXPERTS = ("model.experts=3", "model.centers=cosine")
OVERRIDES = {
    "focal": ("loss.focal.class_balanced=true",),
    "ldam": ("model.centers=cosine", "loss.ldam.drw_epoch=0", "optimizer.nesterov=true"),
    "multi_task": ("loss.multi_task.softmax=balanced_softmax", "loss.multi_task.weight=0.5"),
    "ride": (*EXPERTS, "loss.ride.reweight_epoch=0", "optimizer.nesterov=true", "model.initialisation=published"),
    "routing": (*EXPERTS, "model.trained=routers", "model.start_from=unused"),
    "balpoe": (*EXPERTS, "step.mixup=0.4", "optimizer.nesterov=true"),
    "sade": (*EXPERTS, "optimizer.nesterov=true"),
    "mdcs": (*EXPERTS, "optimizer.nesterov=true", "loss.mdcs.ramp_epochs=0"),
    "bcl": ("key_encoder=none", "queue.length=0"),
    "proco": ("key_encoder=none", "loss.temperature=0.1"),
}
STAGES = {m: i % 4 for i, m in enumerate(sorted(METHODS))} | {"bcl": 3, "supcon": 3}
RESUMED = [m for i, m in enumerate(sorted(METHODS)) if (i + i // 4) % 4 == 3]  # of every four one, at each stage one
RESUMED += ["mdcs"]  # whose second views no other method without contrast has


@pytest.fixture
def outcome(pool):
    """(world size, stage, overrides) -> what the first rank saw."""

    def run(world_size: int, stage: int, *overrides: str) -> Outcome:
        arguments = {"stage": stage, "steps": STEPS, "overrides": (*SMALL, *overrides)}
        return pool(world_size).run("tests.distributed.runs:run_steps", **arguments)[0]

    return run


def settings_of(method: str) -> tuple[str, ...]:
    return (f"loss.method={method}", *OVERRIDES.get(method, ()))


def moved(outcome: Outcome, part: str) -> float:
    """||dw|| of a part of the model."""
    still = Outcome([], outcome.before, outcome.before, {}, {})
    return update_difference(still, outcome, part)[0]


@pytest.mark.parametrize("method", [pytest.param(m, id=f"{m}-stage{STAGES[m]}") for m in sorted(METHODS)])
def test_two_ranks_take_the_steps_of_one(outcome, method):
    """Losses to 1e-5 and updates to 1e-3, the two ranks at a ZeRO stage, the one without."""
    two = outcome(2, STAGES[method], *settings_of(method))
    check(two, outcome(1, 0, *settings_of(method)), FLOAT32)
    assert two.skipped == [None] * STEPS
    assert all(value.isfinite().all() for value in two.after.values())
    assert (moved(two, "query_encoder") > 0) == (method != "routing")
    assert (moved(two, "centers") > 0) == (method not in ("supcon", "routing"))
    assert moved(two, "prototypes") > 0 or method != "bcl"
    assert moved(two, "routers") > 0 or method != "routing"


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_supcon_leaves_centers_alone_at_every_stage(outcome, stage):
    """Not even weight decay or momentum reaches what stage one does not train (stage 3 above)."""
    two = outcome(2, stage, *settings_of("supcon"), "optimizer.weight_decay=0.5")
    assert moved(two, "centers") == 0
    assert moved(two, "query_encoder") > 0
    assert not any("centers" in name for name in two.states)


@pytest.mark.parametrize("overrides", [("key_encoder=none",), ("model.experts=2",)], ids=["two_views", "experts"])
def test_bcl_meets_keys_and_experts(outcome, overrides):
    """One encoder with a queue, and experts with prototypes of their own."""
    settings = ("loss.method=bcl", *overrides)
    two = outcome(2, 1, *settings)
    check(two, outcome(1, 0, *settings), FLOAT32)
    assert moved(two, "prototypes") > 0


@pytest.mark.parametrize(
    ("plain", "changed"),
    [
        (("loss.method=ldam", "model.centers=cosine", "loss.ldam.drw_epoch=1"), "loss.ldam.drw_epoch=0"),
        (("loss.method=cross_entropy",), "step.mixup=0.4"),
    ],
    ids=["deferred_reweighting", "mixup"],
)
def test_the_step_hands_over_what_changes_the_loss(outcome, plain, changed):
    """A later epoch for re-weighting, and mixing, give other losses: the comparisons above could notice them."""
    losses = outcome(1, 0, *plain).losses, outcome(1, 0, *plain, changed).losses
    assert max(abs(one - other) for one, other in zip(*losses, strict=True)) > 10 * FLOAT32["loss"]


def resumed(pool, shards, folder: Path, stage: int, method: tuple[str, ...], stops: tuple[int, ...]) -> list[str]:
    """What differs between a run on two ranks that was stopped after each of `stops` steps and one that was not."""
    (folder / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    recipe, data = folder / "recipe.yaml", (f"data.shards={shards}", "engine.deepspeed=zero.json")
    if "model.trained=routers" in method:
        write_tiny_recipe(recipe, *data, *settings_of("ride"))
        pool(2).run("tests.distributed.training:train", recipe=recipe, run=folder / "experts")
        method = (*method, f"model.start_from={folder / 'experts'}")
    write_tiny_recipe(recipe, *data, *method)
    found = []
    for name, its_stops in (("straight", (6,)), ("resumed", (*stops, 6))):
        for stop in its_stops:
            pool(2).run("tests.distributed.training:train", recipe=recipe, run=folder / name, stop_at_step=stop)
        checkpoint = newest_checkpoint(folder / name)
        losses = [line["loss"] for line in read(folder / name / "metrics.jsonl") if line["kind"] == "step"]
        assert len(losses) == 6
        state = {**checkpoint.model(), **{f"optimizer: {k}": v for k, v in checkpoint.optimizer().items()}}
        found.append({**state, "losses": torch.tensor(losses, dtype=torch.float64)})
    straight, again = found
    assert straight.keys() == again.keys()
    return [name for name, value in straight.items() if not torch.equal(again[name], value)]


def test_a_loss_that_changes_over_training_resumes_bit_equal(pool, striped_shards, tmp_path):
    """Stopped before the epoch of re-weighting, with mixed images: the run without a stop."""
    method = ("loss.method=ldam", "model.centers=cosine", "loss.ldam.drw_epoch=1", "step.mixup=0.4")
    assert resumed(pool, striped_shards, tmp_path, 1, method, stops=(3,)) == []


@pytest.mark.parametrize("method", [pytest.param(m, id=f"{m}-stage{STAGES[m]}") for m in RESUMED])
def test_stopped_methods_resume_bit_equal(pool, striped_shards, tmp_path, method):
    """A quarter of them and MDCS, stopped in the first epoch: the run without a stop."""
    assert resumed(pool, striped_shards, tmp_path, STAGES[method], settings_of(method), stops=(3,)) == []

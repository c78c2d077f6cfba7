"""Every method takes its steps on two ranks under DeepSpeed as on one, at every ZeRO stage in turn."""

import json

import pytest
import torch

from paco_ds.checkpoint import newest_checkpoint
from paco_ds.losses import METHODS
from paco_ds.metrics.log import read
from tests.distributed.runs import Outcome
from tests.distributed.test_step import FLOAT32, check, update_difference
from tests.recipes import write_tiny_recipe

STEPS = 2
SMALL = ("step.micro_batch=4", "step.micro_batches=2")
EXPERTS = ("model.experts=3", "model.centers=cosine")
OVERRIDES = {
    "focal": ("loss.focal.class_balanced=true",),
    "ldam": ("model.centers=cosine", "loss.ldam.drw_epoch=0"),
    "multi_task": ("loss.multi_task.softmax=balanced_softmax", "loss.multi_task.weight=0.5"),
    "ride": (*EXPERTS, "loss.ride.reweight_epoch=0"),
    "routing": (*EXPERTS, "model.trained=routers", "model.start_from=unused"),
    "balpoe": (*EXPERTS, "step.mixup=0.4"),
    "bcl": ("key_encoder=none", "queue.length=0"),
    "proco": ("key_encoder=none", "loss.temperature=0.1"),
}
STAGES = {method: i % 4 for i, method in enumerate(sorted(METHODS))} | {"bcl": 3, "supcon": 3}


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


@pytest.mark.parametrize("method", sorted(METHODS))
def test_two_ranks_take_the_steps_of_one(outcome, method):
    """Losses to 1e-5 and updates to 1e-3, the two ranks at a ZeRO stage, the one without."""
    two = outcome(2, STAGES[method], *settings_of(method))
    check(two, outcome(1, 0, *settings_of(method)), FLOAT32)
    assert two.refused == [None] * STEPS
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
    assert not any("centers" in name for name in two.momentum)


@pytest.mark.parametrize("overrides", [("key_encoder=none",), ("model.experts=2",)], ids=["two_views", "experts"])
def test_bcl_meets_keys_and_experts(outcome, overrides):
    """One encoder with a queue, and experts with prototypes of their own."""
    settings = ("loss.method=bcl", *overrides)
    check(outcome(2, 1, *settings), outcome(1, 0, *settings), FLOAT32)


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
    assert abs(losses[0][0] - losses[1][0]) > 1e-3


def test_a_loss_that_changes_over_training_resumes_bit_equal(pool, striped_shards, tmp_path):
    """Stopped before the epoch of re-weighting, with mixed images: the run without a stop."""
    (tmp_path / "zero1.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    method = ("loss.method=ldam", "model.centers=cosine", "loss.ldam.drw_epoch=1", "step.mixup=0.4")
    data = (f"data.shards={striped_shards}", "engine.deepspeed=zero1.json")
    write_tiny_recipe(tmp_path / "recipe.yaml", *data, *method)
    found = []
    for name, stops in (("straight", (6,)), ("resumed", (3, 6))):
        for stop in stops:
            run = tmp_path / name
            pool(2).run("tests.distributed.training:train", recipe=tmp_path / "recipe.yaml", run=run, stop_at_step=stop)
        checkpoint = newest_checkpoint(run)
        losses = [line["loss"] for line in read(run / "metrics.jsonl") if line["kind"] == "step"]
        found.append((losses, {**checkpoint.model(), **{f"m.{k}": v for k, v in checkpoint.momentum().items()}}))
    (losses, state), (resumed_losses, resumed_state) = found
    assert len(losses) == 6
    assert resumed_losses == losses
    for name, value in state.items():
        assert torch.equal(resumed_state[name], value), name

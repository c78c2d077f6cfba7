"""Every method on two ranks, at every ZeRO stage: the steps of one rank, and a stopped run that goes on bit-equal."""

import json

import pytest
import torch

from paco_ds.checkpoint import newest_checkpoint
from paco_ds.losses import METHODS
from paco_ds.metrics.log import read
from tests.distributed.test_methods import settings_of
from tests.distributed.test_step import FLOAT32, check
from tests.recipes import write_tiny_recipe

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
STEPS = "tests.distributed.runs:run_steps"
TRAIN = "tests.distributed.training:train"


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_stage_takes_the_steps_of_one_rank(pool, record, method):
    """Two steps at the recipe's learning rate, float32; and under autocast every loss is finite."""
    settings = settings_of(method)
    one = pool(1).run(STEPS, overrides=settings, steps=2)[0]
    holds = False
    try:
        for stage in range(4):
            check(pool(2).run(STEPS, overrides=settings, stage=stage, steps=2)[0], one, FLOAT32)
            half = pool(2).run(STEPS, overrides=settings, stage=stage, steps=2, autocast=True)[0]
            assert half.refused == [None] * 2
        holds = True
    finally:
        record(f"{method}: steps of 2 ranks, stages 0 to 3", "those of one rank" if holds else "differ", holds)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_stopped_run_goes_on_bit_equal(pool, record, striped_shards, tmp_path, method):
    """Stopped in the first epoch and in the second, at a stage that rotates with the method."""
    stage = sorted(METHODS).index(method) % 4
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    data = (f"data.shards={striped_shards}", "engine.deepspeed=zero.json")
    settings = settings_of(method)
    if method == "routing":
        first, experts = tmp_path / "first", settings_of("ride")
        write_tiny_recipe(tmp_path / "first.yaml", *data, *experts)
        pool(2).run(TRAIN, recipe=tmp_path / "first.yaml", run=first)
        settings = (*settings, f"model.start_from={first}")
    write_tiny_recipe(tmp_path / "recipe.yaml", *data, *settings)
    found = []
    for name, stops in (("straight", (6,)), ("resumed", (3, 5, 6))):
        run = tmp_path / name
        for stop in stops:
            pool(2).run(TRAIN, recipe=tmp_path / "recipe.yaml", run=run, stop_at_step=stop)
        checkpoint = newest_checkpoint(run)
        losses = [line["loss"] for line in read(run / "metrics.jsonl") if line["kind"] == "step"]
        found.append((losses, {**checkpoint.model(), **{f"m.{k}": v for k, v in checkpoint.momentum().items()}}))
    (losses, state), (resumed_losses, resumed_state) = found
    different = [name for name, value in state.items() if not torch.equal(resumed_state[name], value)]
    holds = losses == resumed_losses and len(losses) == 6 and not different
    record(f"{method}: resumed twice on 2 ranks, stage {stage}", "bit-equal" if holds else f"{different}", holds)
    assert losses == resumed_losses
    assert not different

"""Settings that change how a step is run leave the step: on two ranks, at every ZeRO stage where they work."""

import pytest
import torch

from tests.distributed.test_step import FLOAT32, STEPS, check, reference


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("setting", ["channels_last", "activation_checkpointing"])
def test_the_step_is_that_of_one_process(pool, setting, stage):
    """Losses, updates and running statistics of the plain loop, which knows nothing of these settings."""
    overrides = (f"engine.{setting}=true",)
    for outcome in pool(2).run("tests.distributed.runs:run_steps", stage=stage, steps=STEPS, overrides=overrides):
        check(outcome, reference(), FLOAT32)


def test_repeated_forwards_have_the_precision_of_the_first(pool):
    """Under autocast at stage 3, which gathers weights for them again: the step without checkpointing, bit for bit."""
    arguments = {"stage": 3, "steps": STEPS, "autocast": True}
    plain = pool(2).run("tests.distributed.runs:run_steps", **arguments)[0]
    override = ("engine.activation_checkpointing=true",)
    repeated = pool(2).run("tests.distributed.runs:run_steps", overrides=override, **arguments)[0]
    assert repeated.losses == plain.losses
    for name, value in plain.after.items():
        assert torch.equal(repeated.after[name], value), name


def test_both_go_together_under_autocast(pool):
    """Other kernels round bfloat16 otherwise: losses stay as near to float32's as those of plain autocast."""
    both = ("engine.channels_last=true", "engine.activation_checkpointing=true")
    outcome = pool(2).run("tests.distributed.runs:run_steps", overrides=both, stage=1, steps=STEPS, autocast=True)[0]
    distances = [abs(a - b) / b for a, b in zip(outcome.losses, reference().losses, strict=True)]
    assert 1e-6 < max(distances) < 0.02


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_compiled_encoders_take_the_step_of_one_process(pool, stage):
    """Running statistics, keys and all, within rounding: compiled sums run in another order, so three steps of this
    small network part by 3e-3. The wrong steps of test_step.py part by a hundred times that, or by their loss."""
    shallow = "model.backbone=cifar_resnet8"  # every kind of layer, and a third of them to compile
    arguments = {"stage": stage, "steps": STEPS, "overrides": ("engine.compile=true", shallow)}
    for outcome in pool(2).run("tests.distributed.runs:run_steps", timeout=600, **arguments):
        check(outcome, reference(shallow), {"loss": FLOAT32["loss"], "update": 1e-2})


def test_compile_is_refused_at_stage_3_on_every_rank(pool):
    """Before any of them waits for another."""
    for message in pool(2).run("tests.distributed.runs:error_of_compile_at_stage_3"):
        assert "engine.compile=false" in message

"""Settings that change how a step is run leave the step: on two ranks, at every ZeRO stage where they work."""

import functools

import pytest
import torch

from tests.distributed.reference import plain_steps
from tests.distributed.runs import Outcome
from tests.distributed.test_step import STEPS, check, reference, update_difference
from tests.matrix import matrix
from tests.recipes import tiny_recipe

STEP = "tests.distributed.runs:run_steps"
SHALLOW = "model.backbone=cifar_resnet8"  # every kind of layer, and a third of them to compile
TERMS = 9 * 16  # of the longest sum in a convolution: 3 x 3 weights of 16 channels


@functools.cache
def exact_step() -> tuple[dict[str, torch.Tensor], Outcome, dict[str, float]]:
    """(weights, the step from them with encoders in float64, how far from it float32 may lead).

    A sum of n terms in float32 is, in whatever order, the exact sum of terms that are off by at most n 2^-24 of
    themselves. So the bounds are what the exact step changes by if all weights are moved by that much, up or down.
    """
    recipe, start = tiny_recipe(SHALLOW), reference(SHALLOW).after  # trained: keys have weights of their own
    generator = torch.Generator().manual_seed(0)
    moved = {
        name: value * (1 + TERMS * 2**-24 * (2 * torch.randint(2, value.shape, generator=generator) - 1))
        if value.is_floating_point()
        else value
        for name, value in start.items()
    }
    exact, off = (plain_steps(recipe, 1, recipe.lr, weights, torch.float64) for weights in (start, moved))
    parts = ("running", "query_encoder", "key_encoder", "centers")
    updates = (update_difference(off, exact, part) for part in parts)
    bounds = {
        "loss": abs(off.losses[0] - exact.losses[0]),
        "update": max(difference / size for difference, size in updates),
    }
    return start, exact, bounds


def check_one_step(pool, setting: str, stage: int) -> None:
    """Of two ranks, from equal weights: loss, updates and running statistics."""
    start, exact, bounds = exact_step()
    overrides = (SHALLOW, f"engine.{setting}=true")
    for outcome in pool(2).run(STEP, stage=stage, steps=1, overrides=overrides, state=start):
        check(outcome, exact, bounds)


@pytest.mark.parametrize(
    ("setting", "stage"),
    matrix(
        ("channels_last", "activation_checkpointing"),
        (0, 1, 2, 3),
        each_change=[
            ("channels_last", 0),
            ("channels_last", 2),
            ("activation_checkpointing", 1),
            ("activation_checkpointing", 3),
        ],
    ),
)
def test_the_step_is_that_of_one_process(pool, setting, stage):
    """Within float32 rounding it is the step of the plain loop, which knows nothing of these settings."""
    check_one_step(pool, setting, stage)


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.soak), 1, pytest.param(2, marks=pytest.mark.soak)])
def test_compiled_encoders_take_the_step_of_one_process(pool, stage):
    """Their sums run in another order on every kind of CPU; running statistics, keys and all stay within rounding."""
    check_one_step(pool, "compile", stage)


@pytest.mark.parametrize(
    "wrong",
    [
        {"autocast": True},
        {"fault": "gradients doubled"},
        {"fault": "micro-batch lost"},
        {"fault": "statistics not averaged"},
        {"fault": "no moving average"},
    ],
    ids=lambda wrong: wrong.get("fault", "bfloat16"),
)
def test_the_bounds_of_rounding_notice_a_wrong_step(pool, wrong):
    """Negative controls: sums of bfloat16, and steps that are wrong in one way."""
    start, exact, bounds = exact_step()
    outcome = pool(2).run(STEP, stage=1, steps=1, overrides=(SHALLOW,), state=start, fault_step=0, **wrong)[0]
    with pytest.raises(AssertionError, match="differ"):
        check(outcome, exact, bounds)


def test_repeated_forwards_have_the_precision_of_the_first(pool):
    """Under autocast at stage 3, which gathers weights for them again: the step without checkpointing, bit for bit."""
    arguments = {"stage": 3, "steps": STEPS, "autocast": True}
    plain = pool(2).run(STEP, **arguments)[0]
    override = ("engine.activation_checkpointing=true",)
    repeated = pool(2).run(STEP, overrides=override, **arguments)[0]
    assert repeated.losses == plain.losses
    for name, value in plain.after.items():
        assert torch.equal(repeated.after[name], value), name


def test_both_go_together_under_autocast(pool):
    """Other kernels round bfloat16 otherwise: losses stay as near to float32's as those of plain autocast."""
    both = ("engine.channels_last=true", "engine.activation_checkpointing=true")
    outcome = pool(2).run(STEP, overrides=both, stage=1, steps=STEPS, autocast=True)[0]
    distances = [abs(a - b) / b for a, b in zip(outcome.losses, reference().losses, strict=True)]
    assert 1e-6 < max(distances) < 0.02


def test_compile_is_refused_at_stage_3_on_every_rank(pool):
    """Before any of them waits for another."""
    for message in pool(2).run("tests.distributed.runs:error_of_compile_at_stage_3"):
        assert "engine.compile=false" in message

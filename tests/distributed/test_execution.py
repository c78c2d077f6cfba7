"""Settings that change how a step is run leave the step: on two ranks, at every ZeRO stage where they work."""

import pytest

from tests.distributed.test_step import AUTOCAST, FLOAT32, STEPS, check, reference


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("setting", ["channels_last", "activation_checkpointing"])
def test_the_step_is_that_of_one_process(pool, setting, stage):
    """Losses, updates and running statistics of the plain loop, which knows nothing of these settings."""
    overrides = (f"engine.{setting}=true",)
    for outcome in pool(2).run("tests.distributed.runs:run_steps", stage=stage, steps=STEPS, overrides=overrides):
        check(outcome, reference(), FLOAT32)


def test_both_go_together_under_autocast(pool):
    """At stage 3, where weights are gathered for the repeated forwards too."""
    arguments = {"stage": 3, "steps": STEPS, "autocast": True}
    both = ("engine.channels_last=true", "engine.activation_checkpointing=true")
    plain = pool(2).run("tests.distributed.runs:run_steps", **arguments)[0]
    check(pool(2).run("tests.distributed.runs:run_steps", overrides=both, **arguments)[0], plain, AUTOCAST)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_compiled_encoders_take_the_step_of_one_process(pool, stage):
    """Running statistics, keys and all; the compiled code of one stage is found in the cache by the next."""
    overrides = ("engine.compile=true",)
    outcomes = pool(2).run(
        "tests.distributed.runs:run_steps", timeout=600, stage=stage, steps=STEPS, overrides=overrides
    )
    for outcome in outcomes:
        check(outcome, reference(), FLOAT32)


def test_compile_is_refused_at_stage_3_on_every_rank(pool):
    """Before any of them waits for another."""
    for message in pool(2).run("tests.distributed.runs:error_of_compile_at_stage_3"):
        assert "engine.compile=false" in message

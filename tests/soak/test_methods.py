"""Every method on two ranks, at every ZeRO stage: the steps of one rank, and a stopped run that goes on bit-equal."""

import pytest

from paco_ds.config.methods import METHODS
from tests.distributed.test_methods import resumed, settings_of
from tests.distributed.test_step import FLOAT32, check

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
STEPS = "tests.distributed.runs:run_steps"


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
            assert half.skipped == [None] * 2
        holds = True
    finally:
        record(f"{method}: steps of 2 ranks, stages 0 to 3", "those of one rank" if holds else "differ", holds)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_stopped_run_goes_on_bit_equal(pool, record, striped_shards, tmp_path, method):
    """Stopped in the first epoch and in the second, at a stage that rotates with the method."""
    stage = sorted(METHODS).index(method) % 4
    different = resumed(pool, striped_shards, tmp_path, stage, settings_of(method), stops=(3, 5))
    record(
        f"{method}: resumed twice on 2 ranks, stage {stage}",
        f"{different}" if different else "bit-equal",
        not different,
    )
    assert not different

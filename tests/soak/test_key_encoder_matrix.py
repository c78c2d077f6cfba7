"""The moving average of 20 recorded steps in every combination of stage, autocast, offload, accumulation and
persistence threshold; a third of them on each number of ranks."""

import itertools
from typing import Any

import pytest

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
PARTITION_ALL = {"stage3_param_persistence_threshold": 0}


def settings_of(stage: int) -> list[dict[str, Any]]:
    """zero_optimization settings that exist at a stage."""
    offload = [{}, OFFLOAD] if stage > 0 else [{}]
    partition = [{}, PARTITION_ALL] if stage == 3 else [{}]
    return [{**a, **b} for a, b in itertools.product(offload, partition)]


RANKS = (1, 2, 4)
COMBINATIONS = [
    (stage, zero, autocast, accumulation)
    for stage in range(4)
    for zero, autocast, accumulation in itertools.product(settings_of(stage), (False, True), (1, 2))
]


@pytest.mark.parametrize("world_size", RANKS)
def test_every_combination_leaves_the_average_of_the_recorded_weights(pool, record, world_size):
    """To 1e-6 of a float64 average."""
    worst, mine = 0.0, COMBINATIONS[RANKS.index(world_size) :: len(RANKS)]
    for stage, zero, autocast, accumulation in mine:
        results = pool(world_size).run(
            "tests.distributed.key_runs:moving_average",
            stage=stage,
            autocast=autocast,
            zero=zero,
            overrides=(f"step.micro_batches={accumulation * world_size}",),
        )
        error = max(error for error, _ in results)
        assert error <= 1e-6, f"stage {stage}, {autocast=}, {zero}, {accumulation=}: {error:.1e}"
        worst = max(worst, error)
    record(f"key encoder after 20 steps, {world_size} ranks, {len(mine)} combinations", f"{worst:.1e}", worst <= 1e-6)

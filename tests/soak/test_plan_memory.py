"""Plans of larger models against real runs, every stage."""

import pytest

from tests.distributed.test_plan import LARGE, check_memory

pytestmark = pytest.mark.soak

RESNET50 = (*LARGE, "model.backbone=resnet50", "step.micro_batch=16", "views.query.size=128", "views.key.size=128")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("model", ["resnet18", "resnet50"])
def test_planned_memory_is_within_15_percent_at_every_stage(pool, record, model, world_size, stage):
    """A network of activations and one of weights."""
    ratio = check_memory(pool, world_size, stage, RESNET50 if model == "resnet50" else LARGE)
    record(f"planned / measured memory, {model}, {world_size} ranks, stage {stage}", f"{ratio:.3f}", True)

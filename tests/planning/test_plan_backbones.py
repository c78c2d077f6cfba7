"""Networks of timm are planned: the bytes of one micro-batch, of which activation checkpointing saves most."""

import pytest

from paco_ds.distributed.ranks import MicroBatchLayout
from paco_ds.planning.memory import plan_memory, zero_settings
from paco_ds.planning.planned_rank import PlannedRank
from paco_ds.planning.trace import trace_step
from tests.models.tiny_networks import TINY, of
from tests.recipes import tiny_recipe

EACH_CHANGE = ("vit", "efficientnet")


@pytest.mark.parametrize(
    "family", [family if family in EACH_CHANGE else pytest.param(family, marks=pytest.mark.soak) for family in TINY]
)
def test_a_network_of_each_family_is_traced_without_numbers(family):
    """What autograd keeps falls to less than half; keys are shuffled only where something normalises by batches."""
    three_layer = (*of(family), "model.projection=three_layer", "key_encoder.batch_norm=auto")
    plain = trace_step(tiny_recipe(*three_layer), (8, 4, 2), autocast=False)
    recomputed = trace_step(tiny_recipe(*three_layer, "engine.activation_checkpointing=true"), (8, 4, 2), False)
    assert recomputed.saved < plain.saved / 2
    assert recomputed.trained == plain.trained
    assert plain.shuffles_keys == (family == "efficientnet")


def test_of_a_tuned_network_what_is_trained_has_gradients_and_states():
    """LoRA and the heads; the rest is held once, without either."""
    whole, tuned = (*of("vit"), "loss.method=cross_entropy"), ("model.trained=lora", "model.start_from=x")
    plain, parts = (trace_step(tiny_recipe(*each), (8, 4, 2), False) for each in (whole, (*whole, *tuned)))
    heads = 3 * 16 + 3
    assert sum(parts.followed) == sum(plain.trained) - heads
    assert sum(parts.trained) < sum(plain.trained)


def test_a_moving_average_is_planned_as_held_weights():
    """Of backbone and centers, in memory as the key encoder's: whole below stage 3, this rank's share there."""
    settings = (*of("efficientnet"), "loss.method=cross_entropy")
    recipe = tiny_recipe(*settings, "evaluation.weights=ema")
    plain, averaged = trace_step(tiny_recipe(*settings), (8, 4, 2), False), trace_step(recipe, (8, 4, 2), False)
    assert averaged.followed == plain.trained
    assert averaged.statistics == plain.statistics
    layout = MicroBatchLayout(recipe.step.micro_batch, recipe.step.micro_batches, 0, 2)
    for stage, share in ((1, 1), (3, 2)):
        zero = zero_settings({}, stage)
        held, without = (
            plan_memory(PlannedRank(recipe, trace, 3, layout), zero, "cuda").parts["key encoder"]
            for trace in (averaged, plain)
        )
        assert held - without == pytest.approx(4 * sum(plain.trained) / share, abs=4)

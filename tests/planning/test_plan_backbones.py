"""Networks of timm are planned: the bytes of one micro-batch, of which activation checkpointing saves most."""

import pytest

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

"""Groups of parameters: timm's own, of its networks; one group of all where nothing tells them apart."""

import re

import pytest
import timm
from timm.optim import param_groups_layer_decay

from paco_ds.errors import RecipeError
from paco_ds.training.parameter_groups import LR_FACTOR, parameter_groups
from tests.models.tiny_networks import SIZE, TINY, of
from tests.recipes import model_of, tiny_recipe

DECAYED = ("optimizer.weight_decay=0.05", "optimizer.layer_decay=0.5")


def groups_by_name(recipe):
    """{parameter: (factor of its learning rate, weight decay)}"""
    model = model_of(recipe, 9)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, recipe.optimizer)
    return {names[id(p)]: (group[LR_FACTOR], group["weight_decay"]) for group in groups for p in group["params"]}


@pytest.mark.parametrize("family", TINY)
def test_depths_and_weight_decay_are_those_of_timm(family):
    """Of the network with a classifier of its own; projection and centers learn as that does."""
    ours = groups_by_name(tiny_recipe(*of(family), *DECAYED, "optimizer.decay_norms_and_biases=false"))
    name, kwargs = TINY[family]
    try:
        theirs = timm.create_model(name, num_classes=9, img_size=SIZE, **kwargs)
    except TypeError:
        theirs = timm.create_model(name, num_classes=9, **kwargs)
    undecayed = getattr(theirs, "no_weight_decay", set)()
    groups = param_groups_layer_decay(theirs, 0.05, undecayed, layer_decay=0.5)
    wanted = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    classifier = theirs.get_classifier()
    heads = {id(p): p.ndim for p in classifier.parameters()}
    assert {wanted[p][0] for p in heads} == {1.0}
    compared = 0
    for name, parameter in theirs.named_parameters():
        if id(parameter) not in heads:
            assert ours[f"query_encoder.backbone.network.{name}"] == pytest.approx(wanted[id(parameter)]), name
            compared += 1
    heads_of_ours = {name: group for name, group in ours.items() if ".backbone." not in name}
    assert len(ours) == compared + len(heads_of_ours)
    assert {factor for factor, _ in heads_of_ours.values()} == {1.0}
    assert heads_of_ours["centers.weight"] == (1.0, 0.05)
    assert heads_of_ours["centers.bias"] == (1.0, 0.0)


def test_as_published_all_parameters_are_one_group():
    """In the order of the model, weight decay on biases and BatchNorm too."""
    recipe = tiny_recipe()
    model = model_of(recipe, 9)
    (group,) = parameter_groups(model, recipe.optimizer)
    assert (group["weight_decay"], group[LR_FACTOR]) == (5e-4, 1.0)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert [id(p) for p in group["params"]] == [id(p) for p in trained]


def test_norms_and_biases_of_a_resnet_are_those_of_one_dimension():
    """It names nothing else."""
    for name, (factor, decay) in groups_by_name(tiny_recipe("optimizer.decay_norms_and_biases=false")).items():
        assert factor == 1.0
        assert (decay == 0) == bool(re.search(r"bias$|\.(bn|norm)\w*\.|downsample\.1\.|\.1\.weight$", name)), name


def test_layer_decay_needs_a_network_that_says_how_deep_its_layers_are():
    """Refused with a network that does."""
    recipe = tiny_recipe("optimizer.layer_decay=0.75")
    with pytest.raises(RecipeError, match=r"optimizer.layer_decay 0.75: this backbone does not say .*timm:vit_base"):
        parameter_groups(model_of(recipe, 9), recipe.optimizer)

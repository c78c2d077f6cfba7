"""What is added to a ViT: nothing at first, its equation, merged without a trace, refused by name elsewhere."""

import pytest
import timm
import torch
import torch.nn.functional as F

from paco_ds.errors import RecipeError
from paco_ds.models.adapters import Bottleneck, LowRankLinear, add_adapters, is_added, merged
from paco_ds.training.initial_weights import freeze
from tests.models.tiny_networks import of
from tests.recipes import model_of, tiny_recipe

START = ("model.start_from=somewhere", "key_encoder.batch_norm=auto")


def made(trained, *overrides, family="vit"):
    """(model, its backbone in evaluation), frozen as a run's."""
    recipe = tiny_recipe(*of(family), *START, f"model.trained={trained}", *overrides)
    model = model_of(recipe, 5)
    freeze(model, recipe.model)
    return model.eval(), model.query_encoder.backbone


def trained_names(module):
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def drawn(module):
    """The module with all that is added drawn, in float64."""
    module.double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if is_added(name):
                parameter.normal_(0, 0.3)
    return module


@pytest.mark.parametrize("trained", ["lora", "adaptformer"])
@pytest.mark.parametrize("family", ["vit", "deit3", "dinov2"])
def test_what_is_added_changes_nothing_at_first_and_keeps_the_networks_names(trained, family):
    """timm's own network of the same weights gives the same features."""
    _, backbone = made(trained, family=family)
    theirs = model_of(tiny_recipe(*of(family)), 5).query_encoder.backbone.network.eval()
    ours = {name: t for name, t in backbone.network.state_dict().items() if not is_added(name)}
    theirs.load_state_dict(ours, strict=True)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(backbone(images), theirs(images), rtol=0, atol=0)
    assert trained_names(backbone) == {f"network.{n}" for n in backbone.network.state_dict() if is_added(n)} - {
        f"network.blocks.{b}.adapter.scale" for b in range(4)
    }


def test_lora_is_its_equation():
    """W x + b + alpha / rank B A x (Hu et al. 2022, Eq. 3), in float64."""
    recipe = tiny_recipe(*of("vit"), *START, "model.trained=lora", "model.lora={rank: 3, alpha: 6}")
    layer = drawn(LowRankLinear(torch.nn.Linear(7, 5), recipe.model.lora))
    x = torch.randn(2, 7, dtype=torch.float64)
    expected = x @ layer.weight.T + layer.bias + 6 / 3 * (x @ layer.lora_down.T @ layer.lora_up.T)
    torch.testing.assert_close(layer(x), expected, rtol=1e-14, atol=1e-14)
    assert not LowRankLinear(torch.nn.Linear(7, 5), recipe.model.lora).lora_up.any()


def test_adaptformer_is_its_equation():
    """x + MLP(LN(x)) + scale W_up relu(W_down LN(x)) after the attention (Chen et al. 2022, Eq. 4), in float64."""
    _, backbone = made("adaptformer", "model.adaptformer={width: 3, scale: 0.5}")
    block = drawn(backbone.network.blocks[0])
    a, x = block.adapter, torch.randn(2, 5, 16, dtype=torch.float64)
    y = x + block.attn(block.norm1(x))
    hidden = F.layer_norm(y, (16,), a.norm.weight, a.norm.bias) @ a.down.weight.T + a.down.bias
    expected = y + block.mlp(block.norm2(y)) + a.scale * (hidden.clamp(min=0) @ a.up.weight.T + a.up.bias)
    torch.testing.assert_close(block(x), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("learned", [False, True])
def test_a_bottleneck_begins_at_zero_and_learns_its_scale_on_request(learned):
    """As published: W_up zero, scale .1; LIFT learns it."""
    settings = tiny_recipe(f"model.adaptformer.learned_scale={learned}").model.adaptformer
    bottleneck = Bottleneck(16, settings)
    assert not bottleneck(torch.randn(2, 3, 16)).any()
    assert bottleneck.scale.item() == pytest.approx(0.1)
    assert bottleneck.scale.requires_grad == learned


def test_merged_layers_answer_as_lora_and_have_timms_names():
    """To 1e-12 in float64; the model that was merged stays as it is."""
    _, backbone = made("lora")
    drawn(backbone)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    one = merged(backbone)
    torch.testing.assert_close(one(images), backbone(images), rtol=1e-12, atol=1e-12)
    assert not any(is_added(name) for name in one.state_dict())
    assert any(is_added(name) for name in backbone.state_dict())
    assert merged(one) is one


@pytest.mark.parametrize("trained", ["lora", "adaptformer"])
def test_the_key_encoder_has_adapters_of_its_own(trained):
    """A copy whose forward uses its own weights."""
    model, backbone = made(trained)
    images = torch.randn(2, 3, 32, 32)
    before = model.key_encoder.backbone(images)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            parameter.add_(0.1 if is_added(name) else 0)
    assert torch.equal(model.key_encoder.backbone(images), before)
    assert not torch.allclose(backbone(images), before)


def test_norms_and_biases_are_those_of_the_backbone():
    """Heads are trained with them."""
    model, backbone = made("norms")
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in trained_names(backbone)} == {
        "norm1",
        "norm2",
        "norm",
    }
    _, backbone = made("biases")
    assert all(name.endswith("bias") for name in trained_names(backbone))
    assert "network.blocks.0.attn.qkv.bias" in trained_names(backbone)
    assert {"centers.weight", "query_encoder.projection.0.weight"} <= trained_names(model)


@pytest.mark.parametrize("trained", ["lora", "adaptformer"])
@pytest.mark.parametrize("backbone", ["resnet18", "timm:convnext_atto", "timm:eva02_tiny_patch14_224", "vit_b_16"])
def test_other_networks_are_refused_by_name(trained, backbone):
    """A CNN, and transformers whose layers are computed without being called."""
    size = 56 if backbone.startswith("timm:eva") else 224 if backbone == "vit_b_16" else 64
    sizes = (f"views.{view}.size={size}" for view in ("query", "key", "evaluation"))
    recipe = tiny_recipe(
        *sizes,
        f"views.evaluation.resize={size}",
        f"model.backbone={backbone}",
        f"model.trained={trained}",
        "model.start_from=x",
    )
    with torch.device("meta"), pytest.raises(RecipeError, match=f"{trained} adds to the blocks of timm's .*{backbone}"):
        model_of(recipe, 5)


def test_a_rank_that_is_none_is_refused():
    """Of as many rows as the weight."""
    with pytest.raises(RecipeError, match=r"model.lora.rank 16 is not below 16, the width of timm:vit_tiny"):
        made("lora", "model.lora.rank=16")


def test_timms_block_computes_what_the_bottleneck_stands_beside():
    """Its forward, which is written out once more, is pinned: with zero added they are bit-equal, layer scale too."""
    block = timm.models.vision_transformer.Block(16, 2, init_values=0.1).eval()
    settings = tiny_recipe().model.adaptformer
    x = torch.randn(2, 5, 16)
    before = block(x)
    add_adapters([block], settings, "a block")
    assert torch.equal(block(x), before)

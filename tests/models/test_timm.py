"""timm's networks as backbones: arguments and sizes, depth groups, experts, and how they are run."""

import copy

import pytest
import timm
import torch
import torchvision
from timm.optim._param_groups import param_groups_layer_decay

from paco_ds.config.model import ModelSettings
from paco_ds.errors import RecipeError
from paco_ds.models.backbones import make_backbone
from paco_ds.models.execution import prepare
from paco_ds.models.experts import whole_name
from paco_ds.models.families import ImageSizes
from tests.models.tiny_networks import SIZE, TINY, of
from tests.recipes import model_of, tiny_recipe


def made(family, training=SIZE, evaluation=None, experts=None, **kwargs):
    name, own = TINY[family]
    settings = ModelSettings(backbone=f"timm:{name}", kwargs={**own, **kwargs}, experts=experts)
    return make_backbone(settings, ImageSizes(training, evaluation or training))


def images(count=2, size=SIZE):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", TINY)
def test_a_network_of_each_family_is_timms_own_and_its_feature_is_found(family):
    """Same weights, same feature; the dimension is what comes out, also where a network's head widens it."""
    name, kwargs = TINY[family]
    backbone = made(family).eval()
    theirs = timm.create_model(name, num_classes=7, **backbone.arguments).eval()
    theirs.load_state_dict({**theirs.state_dict(), **backbone.network.state_dict()})
    feature = backbone(images())
    assert feature.shape == (2, backbone.feature_dim)
    torch.testing.assert_close(feature, theirs.forward_head(theirs.forward_features(images()), pre_logits=True))
    assert backbone.arguments == {**kwargs, **({"img_size": SIZE} if "img_size" in backbone.arguments else {})}
    assert ("img_size" in backbone.arguments) == (family not in ("convnext", "efficientnet"))


def test_a_head_that_widens_the_feature_is_found():
    """MobileNetV3 pools 288 channels and its head makes 1024 of them."""
    with torch.device("meta"):
        backbone = make_backbone(ModelSettings(backbone="timm:mobilenetv3_small_050"), ImageSizes(64, 64))
    assert (backbone.network.num_features, backbone.feature_dim) == (288, 1024)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"drop_pathrate": 0.1}, r"model.kwargs.drop_pathrate is no argument of timm:vit_tiny.*mean drop_path_rate"),
        ({"drop_path_rate": "much"}, "cannot be made with model.kwargs .*'drop_path_rate': 'much'"),
        ({"global_pool": "mean"}, "cannot be made with model.kwargs .*Only avg"),
        ({"global_pool": ""}, r"features of shape \(1, 17, 16\) .*set model.kwargs.global_pool"),
        ({"img_size": 48}, r"views.query.size 32: timm:vit_tiny.* does not take .*\(32\) doesn't match model \(48\)"),
        ({"num_classes": 3}, "model.kwargs.num_classes is set by paco_ds"),
        ({"pretrained": True}, "model.kwargs.pretrained: .*model.start_from alone"),
        ({"pretrained_cfg": {"file": "x.bin"}}, "model.kwargs.pretrained_cfg: .*model.start_from alone"),
        ({"checkpoint_path": "x.bin"}, "model.kwargs.checkpoint_path: .*model.start_from alone"),
    ],
)
def test_arguments_that_a_network_does_not_take_are_refused_by_name(kwargs, message):
    """With near names; weights come by model.start_from alone."""
    with pytest.raises(RecipeError, match=message):
        made("vit", **kwargs)


@pytest.mark.parametrize(
    ("backbone", "sizes", "message"),
    [
        ("timm:vit_tiny_patch16_224", (40, 40), "views.query.size 40: the patches of timm:vit_.* set 32 or 48"),
        ("timm:vit_tiny_patch16_224", (8, 8), "set 16, or model.kwargs.patch_size"),
        ("timm:vit_tiny_patch16_224", (32, 40), "views.evaluation.size 40: the patches"),
        ("timm:vit_tiny_patch16_224", (32, 48), "views.evaluation.size 48: .*dynamic_img_size=true"),
        ("timm:swin_tiny_patch4_window7_224", (64, 32), "views.evaluation.size 32: timm:swin.* does not take"),
        ("vit_b_16", (40, 40), "views.query.size 40: the patches of vit_b_16 have 16 pixels"),
        ("vit_b_16", (32, 48), "views.evaluation.size 48: vit_b_16 has position embeddings for the 32 pixels"),
    ],
)
def test_sizes_of_images_that_a_network_does_not_take_are_refused(backbone, sizes, message):
    """In one line, with the setting: patches that do not divide them, position embeddings of another size."""
    with torch.device("meta"), pytest.raises(RecipeError, match=message) as caught:
        make_backbone(ModelSettings(backbone=backbone), ImageSizes(*sizes))
    assert "\n" not in str(caught.value)


def test_position_embeddings_have_the_size_of_the_recipes_views():
    """Without a word in the recipe; torchvision's ViTs too. timm resamples them for others where it is asked to."""
    assert made("vit", 48).network.pos_embed.shape == (1, 1 + 36, 16)
    dynamic = made("vit", 32, 48, dynamic_img_size=True)
    assert dynamic(images(size=48)).shape == (2, 16)
    with torch.device("meta"):
        theirs = make_backbone(ModelSettings(backbone="vit_b_16"), ImageSizes(64, 64))
    assert theirs.network.encoder.pos_embedding.shape == (1, 1 + 16, 768)


def test_arguments_are_of_timms_networks_alone():
    """A ResNet of torchvision or ours has none."""
    with pytest.raises(RecipeError, match=r"model\.kwargs are arguments of timm's networks, and resnet18 takes none"):
        make_backbone(ModelSettings(backbone="resnet18", kwargs={"drop_path_rate": 0.1}))


@pytest.mark.parametrize("family", TINY)
def test_depth_groups_are_those_of_timms_layer_decay(family):
    """The scale of each parameter in timm's own optimizer groups is decay^(deepest - depth); undecayed names too."""
    backbone = made(family)
    theirs = getattr(backbone.network, "no_weight_decay", set)()
    groups = param_groups_layer_decay(backbone.network, 0.05, theirs, layer_decay=0.5)
    scale = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    depths, undecayed = backbone.depth_groups(), backbone.not_decayed()
    assert depths.keys() == dict(backbone.named_parameters()).keys()
    for name, parameter in backbone.named_parameters():
        lr_scale, decay = scale[id(parameter)]
        assert lr_scale == pytest.approx(0.5 ** (max(depths.values()) - depths[name])), name
        assert (decay == 0) == (parameter.ndim <= 1 or name in undecayed), name
    assert {name.rpartition(".")[2] for name in undecayed} <= {
        "pos_embed", "cls_token", "reg_token", "relative_position_bias_table"
    }  # fmt: skip


def test_a_network_that_names_no_depths_says_so():
    """ResNets of torchvision: layer-wise decay has nothing to go by."""
    backbone = make_backbone(ModelSettings(backbone="cifar_resnet8", width=4))
    assert backbone.depth_groups() is None
    assert backbone.not_decayed() == set()


@pytest.mark.parametrize(("family", "own"), [("vit", 1), ("deit3", 1), ("dinov2", 1), ("swin", 2), ("convnext", 2)])
def test_experts_share_the_first_stages_of_a_network(family, own):
    """With the weights of the whole network each expert is that network; each is drawn by itself; all are trained."""
    whole, experts = made(family).eval(), made(family, experts=2)
    names = list(dict(experts.network.named_parameters()))
    assert {whole_name(name) for name in names} == set(dict(whole.network.named_parameters()))
    first, second = experts(images())
    assert not torch.allclose(first, second)
    experts(images()).square().sum().backward()
    assert [name for name, p in experts.named_parameters() if p.grad is None] == []
    state = whole.network.state_dict()
    experts.network.load_state_dict({name: state[whole_name(name)] for name in experts.network.state_dict()})
    features = experts.eval()(images())
    assert features.shape == (2, 2, experts.feature_dim)
    for feature in features:
        torch.testing.assert_close(feature, whole(images()))
    row = next(name for name in state if name.startswith(("blocks", "layers", "stages"))).partition(".")[0]
    in_experts = {n.split(".")[4] for n in names if n.startswith("experts.0.") and n.split(".")[3] == row}
    assert len(in_experts) == own
    depths, of_whole = experts.depth_groups(), whole.depth_groups()
    assert all(of_whole[f"network.{whole_name(n.removeprefix('network.'))}"] == d for n, d in depths.items())


@pytest.mark.parametrize("family", ["efficientnet", "eva"])
def test_experts_of_a_trunk_that_cannot_branch_are_refused_by_name(family):
    """With the networks that can."""
    with pytest.raises(
        RecipeError, match=f"timm:{TINY[family][0]} has no stages to branch at; .*ViT, Swin or ConvNeXt"
    ):
        made(family, experts=2)
    settings = ModelSettings(backbone="timm:test_vit", experts=2, expert_width="reduced")
    with pytest.raises(RecipeError, match=r"model\.expert_width reduced is of ResNets"):
        make_backbone(settings, ImageSizes(SIZE, SIZE))


@pytest.mark.parametrize("family", ["vit", "swin", "convnext"])
def test_routers_ask_experts_of_timms_networks(family):
    """Also those that no image asks for."""
    settings = ("model.experts=2", "model.centers=cosine", "model.trained=routers", "model.start_from=unused")
    ready = model_of(tiny_recipe(*of(family), *settings, "loss.method=routing"), 5).eval()
    for threshold, asked in ((1.0, 1), (0.0, 2)):
        ready.routers.threshold = threshold
        with torch.no_grad():
            assert ready(pictures()).experts_used.tolist() == [asked] * 4


def model(family, *overrides, **kwargs):
    recipe = tiny_recipe(*of(family, **kwargs), *overrides)
    ready = model_of(recipe, 5)
    prepare(ready, recipe.engine, stage=0)
    return ready


def pictures():
    return torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def run(ready):
    """Logits, gradients and buffers after one forward and backward, and the bytes that autograd kept."""
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = ready(pictures())
        loss = output.logits.square().mean() + output.queries[..., 0].sum()
    loss.backward()
    gradients = {f"grad of {name}": p.grad for name, p in ready.named_parameters() if p.requires_grad}
    return {"logits": output.logits.detach(), **gradients, **dict(ready.named_buffers())}, sum(kept.values())


@pytest.mark.parametrize(("family", "experts"), [*((f, "null") for f in TINY), ("vit", 2), ("swin", 2)])
def test_activation_checkpointing_is_timms_own_and_changes_no_bit(family, experts):
    """Gradients and running statistics, which move once; less is kept for backward."""
    wanted = (f"model.experts={experts}",)
    plain, all_kept = run(model(family, *wanted))
    recomputed, kept = run(model(family, *wanted, "engine.activation_checkpointing=true"))
    assert kept < all_kept
    for name, value in plain.items():
        assert torch.equal(recomputed[name], value), name


def test_without_our_care_running_statistics_would_move_twice():
    """Negative control for the comparison above: timm's switch alone."""
    ready = model("efficientnet")
    ready.query_encoder.backbone.network.set_grad_checkpointing(True)
    statistics = [name for name in dict(ready.named_buffers()) if "running_mean" in name]
    plain, twice = run(model("efficientnet"))[0], run(ready)[0]
    assert any(not torch.equal(twice[name], plain[name]) for name in statistics)


@pytest.mark.parametrize("backbone", ["vgg11", "vit_b_16", "timm:vgg11"])
def test_activation_checkpointing_is_refused_where_it_would_do_nothing(backbone):
    """torchvision's other than ResNets, and those of timm that have none."""
    recipe = tiny_recipe(*of("vit")[2:], f"model.backbone={backbone}", "engine.activation_checkpointing=true")
    with torch.device("meta"):
        ready = model_of(recipe, 5)
    with pytest.raises(RecipeError, match=r"engine\.activation_checkpointing: .*set it to false"):
        prepare(ready, recipe.engine, stage=0)


@pytest.mark.parametrize("family", TINY)
def test_channels_last_changes_no_result_but_for_rounding(family):
    """In float64."""
    fast, plain = model(family, "engine.channels_last=true").double(), model(family).double()
    for ours, theirs in zip(fast(pictures())[:3], plain(pictures())[:3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fast(pictures(), keys=True), plain(pictures(), keys=True), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", TINY)
def test_the_key_encoder_is_the_query_encoder_without_statistics(family):
    """Keys of a fresh model are its queries; both views of GPaCo go through one encoder; a copy is its own."""
    ready = model(family)
    output = ready(pictures())
    torch.testing.assert_close(ready(pictures(), keys=True), output.queries)
    assert not any("running" in name for name in dict(ready.key_encoder.named_buffers()))
    both = model(family, "key_encoder=none")(pictures(), pictures())
    assert both.queries.shape == (8, 8)
    twin = copy.deepcopy(ready)
    for parameter in twin.query_encoder.parameters():
        parameter.data.zero_()
    assert not torch.equal(twin(pictures()).logits, ready(pictures()).logits)


def test_torchvisions_vit_is_itself_at_its_own_size():
    """What ran before runs as before."""
    with torch.device("meta"):
        theirs = torchvision.models.vit_b_16()
        ours = make_backbone(ModelSettings(backbone="vit_b_16"))
    assert {n: t.shape for n, t in ours.network.state_dict().items()} == {
        n: t.shape for n, t in theirs.state_dict().items() if not n.startswith("heads")
    }

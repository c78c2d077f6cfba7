"""Backbones by name, and experts: sizes on paper, and what is refused."""

import pytest
import torch
import torchvision

from paco_ds.config.model import ModelSettings
from paco_ds.errors import RecipeError
from paco_ds.models.backbones import make_backbone


def made(backbone, **settings):
    with torch.device("meta"):
        return make_backbone(ModelSettings(backbone=backbone, **settings))


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "feature_dim"),
    [("resnet18", 512), ("resnet101", 2048), ("resnet152", 2048), ("resnext50_32x4d", 2048), ("vit_b_16", 768)],
)
def test_torchvision_classifiers_end_in_their_feature(name, feature_dim):
    """torchvision's own networks but for the classifier."""
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name)
    backbone = made(name)
    assert parameters(backbone) == parameters(theirs) - 1000 * (feature_dim + 1)
    assert backbone.feature_dim == feature_dim
    assert backbone(torch.zeros(2, 3, 224, 224, device="meta")).shape == (2, feature_dim)


@pytest.mark.parametrize(("name", "millions"), [("resnet200", 62.6), ("resnext101_32x4d", 42.1)])
def test_networks_of_the_paper_that_torchvision_does_not_name(name, millions):
    """64.7 M (He et al. 2016, identity mappings) and 44.2 M (Xie et al. 2017) with their classifiers of 2.05 M."""
    assert parameters(made(name)) / 1e6 == pytest.approx(millions, abs=0.05)
    assert made(name)(torch.zeros(2, 3, 64, 64, device="meta")).shape == (2, 2048)


def resnet50_stages(third, fourth):
    """Parameters of the last two stages of a ResNet-50, counted on paper."""

    def stage(channels, planes, blocks):
        out = 4 * planes
        first = channels * planes + 9 * planes**2 + planes * out + channels * out + 4 * planes + 4 * out
        other = out * planes + 9 * planes**2 + planes * out + 4 * planes + 2 * out
        return first + (blocks - 1) * other

    return stage(512, third, 6) + stage(4 * third, fourth, 3)


@pytest.mark.parametrize(
    ("width", "planes", "feature_dim"), [("full", (256, 512), 2048), ("reduced", (192, 384), 1536)]
)
@pytest.mark.parametrize("count", [1, 4])
def test_experts_share_all_but_the_last_two_stages(count, width, planes, feature_dim):
    """RIDE ResNet-50: stem and two stages once, two stages for each expert."""
    shared = parameters(made("resnet50")) - resnet50_stages(256, 512)
    experts = made("resnet50", experts=count, expert_width=width)
    assert parameters(experts) == shared + count * resnet50_stages(*planes)
    assert experts(torch.zeros(2, 3, 64, 64, device="meta")).shape == (count, 2, feature_dim)


def resnext_stage(channels, planes, blocks):
    """Parameters of a stage of ResNeXt 32x4d, counted on paper: 32 groups, twice the planes within a block."""
    inner, out = 2 * planes, 4 * planes
    grouped = 32 * 9 * (inner // 32) ** 2 + inner * out + 4 * inner + 2 * out  # both inner BatchNorms and the last
    first = channels * inner + grouped + channels * out + 2 * out
    return first + (blocks - 1) * (out * inner + grouped)


@pytest.mark.parametrize(
    ("width", "planes", "feature_dim"), [("full", (256, 512), 2048), ("reduced", (192, 384), 1536)]
)
@pytest.mark.parametrize(("name", "third_blocks"), [("resnext50_32x4d", 6), ("resnext101_32x4d", 23)])
@pytest.mark.parametrize("count", [1, 3])
def test_experts_of_a_resnext_keep_its_groups(name, third_blocks, count, width, planes, feature_dim):
    """RIDE ResNeXt-50 and -101: reduced width divides among 32 groups as well, and parameters are those on paper."""
    experts = made(name, experts=count, expert_width=width)
    assert {m.groups for m in experts.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)} == {32}
    shared = 49 * 3 * 64 + 2 * 64 + resnext_stage(64, 64, 3) + resnext_stage(256, 128, 4)
    third, fourth = planes
    own = resnext_stage(512, third, third_blocks) + resnext_stage(4 * third, fourth, 3)
    assert parameters(experts) == shared + count * own
    assert experts.feature_dim == feature_dim
    assert experts(torch.zeros(2, 3, 64, 64, device="meta")).shape == (count, 2, feature_dim)


def cifar_stage(channels, out):
    """Parameters of five blocks without parameters in their shortcuts, counted on paper."""
    return 9 * channels * out + 9 * out**2 + 4 * out + 4 * (18 * out**2 + 4 * out)


@pytest.mark.parametrize(("width", "second", "third"), [("full", 32, 64), ("reduced", 24, 48)])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_experts_of_a_cifar_resnet_share_its_first_stage(count, width, second, third):
    """RIDE ResNet-32: the stem and 16 channels once, two stages for each expert, reduced to 24 and 48 channels."""
    experts = made("cifar_resnet32", experts=count, expert_width=width)
    shared = 9 * 3 * 16 + 2 * 16 + cifar_stage(16, 16)
    assert parameters(experts) == shared + count * (cifar_stage(16, second) + cifar_stage(second, third))
    assert experts.feature_dim == third
    assert experts(torch.zeros(2, 3, 32, 32, device="meta")).shape == (count, 2, third)


def test_one_full_expert_is_the_network_itself():
    """Same layers in the same order: its weights fit, and give the same features."""
    plain = make_backbone(ModelSettings(backbone="cifar_resnet20", width=4)).eval()
    expert = make_backbone(ModelSettings(backbone="cifar_resnet20", width=4, experts=1)).eval()
    expert.load_state_dict(dict(zip(expert.state_dict(), plain.state_dict().values(), strict=True)))
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(expert(images), plain(images)[None])


def test_experts_differ_from_each_other():
    """Each is initialised by itself."""
    first, second = make_backbone(ModelSettings(backbone="cifar_resnet20", width=4, experts=2))(torch.randn(2, 3, 8, 8))
    assert not torch.allclose(first, second)


def test_timm_networks_end_in_their_feature():
    """By name, where timm is installed."""
    pytest.importorskip("timm")
    assert made("timm:resnet10t")(torch.zeros(2, 3, 64, 64, device="meta")).shape == (2, 512)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "resnet5"}, "did you mean resnet50"),
        ({"backbone": "squeezenet1_0"}, "0 linear classifiers"),
        ({"backbone": "cifar_resnet33"}, "6n\\+2 layers"),
        ({"backbone": "vit_b_16", "experts": 3}, "no stages to branch at"),
    ],
)
def test_what_cannot_be_a_backbone_is_refused_in_words(settings, message):
    """The name, and what to write instead."""
    with pytest.raises(RecipeError, match=message):
        made(**settings)


def test_timm_that_is_not_installed_is_named(monkeypatch):
    """And how to install it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="pip install timm"):
        made("timm:resnet10t")

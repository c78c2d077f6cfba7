"""The model: shapes, parameter counts, and the key encoder's place in it."""

import pytest
import torch
import torchvision
from torch import nn

from paco_ds.config.model import ModelSettings
from paco_ds.errors import RecipeError
from paco_ds.models.backbones import make_backbone
from tests.recipes import model_of, tiny_recipe


@pytest.mark.parametrize(("name", "parameters"), [("cifar_resnet20", 269_722), ("cifar_resnet32", 464_154)])
def test_cifar_resnets_have_the_papers_size(name, parameters):
    """He et al. 2016, Table 6: 0.27 M and 0.46 M parameters, 650 of them the classifier of ten classes."""
    backbone = make_backbone(ModelSettings(backbone=name))
    assert sum(p.numel() for p in backbone.parameters()) + 650 == parameters
    assert backbone(torch.randn(2, 3, 28, 28)).shape == (2, backbone.feature_dim)


@pytest.mark.parametrize(("name", "feature_dim"), [("resnet18", 512), ("resnet50", 2048)])
def test_torchvision_backbones_end_in_their_pooled_feature(name, feature_dim):
    """They are torchvision's own networks but for the classifier."""
    with torch.device("meta"):
        backbone = make_backbone(ModelSettings(backbone=name))
        theirs = torchvision.models.get_model(name)
    classifier = sum(p.numel() for p in theirs.fc.parameters())
    assert sum(p.numel() for p in backbone.parameters()) == sum(p.numel() for p in theirs.parameters()) - classifier
    assert backbone.feature_dim == feature_dim


def test_keys_are_unit_rows_without_gradient_and_queries_have_one():
    """Both encoders start equal; only the query encoder learns."""
    model = model_of(tiny_recipe(), 5)
    images = torch.randint(0, 256, (6, 3, 12, 12), dtype=torch.uint8)
    keys, (_, logits, query, *_) = model(images, keys=True), model(images)
    torch.testing.assert_close(keys, query.detach())
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(6))
    assert logits.shape == (6, 5)
    assert not keys.requires_grad
    assert query.requires_grad
    assert not any(p.requires_grad for p in model.key_encoder.parameters())


def test_the_key_encoder_keeps_no_running_statistics():
    """Its BatchNorm always uses the group's own statistics, in evaluation mode too."""
    model = model_of(tiny_recipe(), 5).eval()
    assert not [name for name, _ in model.key_encoder.named_buffers()]
    images = torch.randint(0, 256, (6, 3, 12, 12), dtype=torch.uint8)
    torch.testing.assert_close(model(images, keys=True), model.train()(images, keys=True))


def test_methods_without_contrast_have_no_key_encoder_or_projection():
    """No unused parameter is trained, moved or saved."""
    model = model_of(tiny_recipe("loss.method=cross_entropy"), 5)
    assert model.key_encoder is None
    assert model.query_encoder.projection is None
    assert model(torch.zeros(2, 3, 12, 12, dtype=torch.uint8)).queries is None


def test_the_recipes_seed_decides_the_first_weights_and_leaves_the_global_generator_alone():
    """Every rank makes the same model, whatever it drew before."""
    torch.manual_seed(1)
    first = model_of(tiny_recipe(), 5)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1) == drawn
    second = model_of(tiny_recipe(), 5)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert isinstance(first.centers, nn.Linear)


def test_prototypes_are_projected_centers_and_belong_to_training():
    """BCL's: unit rows of every class, with gradient to the centers; evaluation sees the outputs of any other model."""
    model = model_of(tiny_recipe("loss.method=bcl"), 5)
    images = torch.zeros(4, 3, 12, 12, dtype=torch.uint8)
    _, _, query, prototypes, *_ = model(images)
    assert prototypes.shape == (5, query.shape[1])
    torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(5))
    (grad,) = torch.autograd.grad(prototypes[0, 0], model.centers.get_parameter("weight"))
    assert grad.abs().max() > 0
    assert model.eval()(images).prototypes is None


def test_supcon_trains_no_centers():
    """They are frozen as drawn, like a key encoder."""
    model = model_of(tiny_recipe("loss.method=supcon"), 5)
    assert not any(p.requires_grad for p in model.centers.parameters())
    assert all(p.requires_grad for p in model.query_encoder.parameters())


def test_published_initialisation_draws_as_the_authors_code():
    """Convolutions of CIFAR ResNets by He with fan-in, the projection's last layer too, cosine centers of length 1; the
    key encoder follows."""
    overrides = ("model.backbone=cifar_resnet20", "model.width=64", "model.projection_dim=256", "model.centers=cosine")
    own, published = (
        model_of(tiny_recipe(*overrides, f"model.initialisation={which}"), 50) for which in ("own", "published")
    )
    convolution = "query_encoder.backbone.network.blocks.3.conv1.weight"
    outputs, inputs, *_ = published.state_dict()[convolution].shape
    assert published.state_dict()[convolution].std().item() == pytest.approx((2 / (9 * inputs)) ** 0.5, rel=0.02)
    assert own.state_dict()[convolution].std().item() == pytest.approx((2 / (9 * outputs)) ** 0.5, rel=0.02)
    last = published.state_dict()["query_encoder.projection.3.weight"]
    assert last.std().item() == pytest.approx((2 / last.shape[1]) ** 0.5, rel=0.02)
    torch.testing.assert_close(published.state_dict()["centers.weight"].norm(dim=1), torch.ones(50))
    images = torch.randint(0, 256, (4, 3, 12, 12), dtype=torch.uint8)
    torch.testing.assert_close(published(images, keys=True), published(images)[2].detach())


def test_published_initialisation_leaves_large_resnets_as_torchvision_has_them():
    """Theirs are torchvision's too."""
    same = [
        model_of(tiny_recipe("model.backbone=resnet18", f"model.initialisation={which}"), 5)
        for which in ("own", "published")
    ]
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in same), strict=True))


@pytest.mark.parametrize(("batch_norm", "moves"), [("evaluation", False), ("training", True)])
def test_a_frozen_encoder_keeps_its_statistics_unless_asked(batch_norm, moves):
    """`training` is the published code of cRT and LWS; weights have no gradient either way."""
    model = model_of(tiny_recipe("loss.method=cross_entropy"), 5)
    model.freeze_backbone(batch_norm)
    model.train()
    mean = model.state_dict()["query_encoder.backbone.network.bn1.running_mean"]
    before = mean.clone()
    model(torch.randint(0, 256, (6, 3, 12, 12), dtype=torch.uint8))
    assert (not torch.equal(before, mean)) == moves
    assert not any(p.requires_grad for p in model.query_encoder.parameters())


def test_small_resnets_keep_the_resolution_at_their_stem():
    """SupContrast's ResNet-50 for CIFAR: 23.5 M parameters, 32 pixels are 4 x 4 in the last stage."""
    backbone = make_backbone(ModelSettings(backbone="resnet50_small"))
    assert sum(p.numel() for p in backbone.parameters()) == 23_500_352
    assert backbone.feature_dim == 2048
    last_stage = backbone.network.get_submodule("layer4")
    assert last_stage(torch.zeros(1, 1024, 8, 8)).shape[-2:] == (4, 4)
    assert backbone(torch.zeros(2, 3, 32, 32)).shape == (2, 2048)


def test_the_key_encoder_is_evaluated_with_the_queries_centers_and_statistics():
    """As a query encoder with its weights would answer; after it queries are evaluated again, and keys normalised by
    their batch."""
    model, twin = model_of(tiny_recipe(), 5), model_of(tiny_recipe(), 5)
    images = torch.randint(0, 256, (6, 3, 12, 12), dtype=torch.uint8)
    model(images)  # running statistics that are not those of the beginning
    with torch.no_grad():
        for weight in model.key_encoder.parameters():
            weight += 0.1 * torch.randn_like(weight)
    state = model.state_dict()
    keys = {f"query_encoder.{name}": tensor for name, tensor in model.key_encoder.named_parameters()}
    twin.load_state_dict(state | keys)
    model.eval(), twin.eval()
    before, made = model(images).mean_logits(), model(images, keys=True)
    with model.evaluating("key"):
        torch.testing.assert_close(model(images).mean_logits(), twin(images).mean_logits(), rtol=0, atol=0)
    assert torch.equal(model(images).mean_logits(), before)
    assert torch.equal(model(images, keys=True), made)
    assert model.state_dict().keys() == state.keys()
    model.use("key")
    assert torch.equal(model(images).mean_logits(), twin(images).mean_logits())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("key_encoder=none", "evaluation.weights=key"), r"weights key: this recipe has no key encoder; set it to ema"),
        (("loss.method=cross_entropy", "evaluation.weights=key"), r"weights key: this recipe has no key encoder"),
    ],
)
def test_keys_that_are_not_made_are_not_evaluated(settings, message):
    """Before anything starts."""
    with pytest.raises(RecipeError, match=message):
        tiny_recipe(*settings)

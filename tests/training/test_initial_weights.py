"""Where training starts from: files and torchvision, what does not fit, and what stays frozen."""

import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from paco_ds.errors import RecipeError
from paco_ds.evaluation.tau_normalization import normalized_weight, tau_normalized
from paco_ds.models.heads import ScaledCenters
from paco_ds.training.initial_weights import freeze, load_initial_weights
from tests.recipes import model_of, tiny_recipe

STATISTICS = ((0.5,) * 3, (0.2,) * 3)


def made(*overrides):
    recipe = tiny_recipe(*overrides)
    return model_of(recipe, 5, *STATISTICS), recipe


def resnet18(*overrides):
    return made("model.backbone=resnet18", *overrides)


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_torchvisions_weights_fill_both_encoders(tmp_path, ending):
    """Its classifier is left out; keys start from the same weights."""
    theirs, path = torchvision.models.resnet18(), tmp_path / f"weights.{ending}"
    (save_file if ending == "safetensors" else torch.save)(theirs.state_dict(), path)
    model, recipe = resnet18(f"model.start_from={path}")
    load_initial_weights(model, recipe.model)
    for encoder in (model.query_encoder, model.key_encoder):
        torch.testing.assert_close(encoder.backbone.network.layer4[1].conv2.weight, theirs.layer4[1].conv2.weight)


@pytest.mark.parametrize("save", [save_file, torch.save])
def test_a_file_without_an_ending_is_no_run(tmp_path, save):
    """As those of a hub's cache are."""
    theirs, path = torchvision.models.resnet18(), tmp_path / "0123456789abcdef"
    save(theirs.state_dict(), path)
    model, recipe = resnet18(f"model.start_from={path}")
    load_initial_weights(model, recipe.model)
    torch.testing.assert_close(model.query_encoder.backbone.network.conv1.weight, theirs.conv1.weight)


class Evil:
    """Runs a function where it is unpickled."""

    def __reduce__(self):
        return print, ("executed",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    """Read with weights_only; nothing of it runs."""
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"conv1.weight": Evil()}))
    model, recipe = resnet18(f"model.start_from={path}")
    with pytest.raises(RecipeError, match="no weights that can be read safely"):
        load_initial_weights(model, recipe.model)
    assert "executed" not in capsys.readouterr().out


def test_weights_of_another_network_are_refused_by_name(tmp_path):
    """A ResNet-34's do not fit a ResNet-18."""
    path = tmp_path / "r34.safetensors"
    save_file(torchvision.models.resnet34().state_dict(), path)
    model, recipe = resnet18(f"model.start_from={path}")
    with pytest.raises(RecipeError, match=r"does not fit this network: \d+ have no place here"):
        load_initial_weights(model, recipe.model)


def test_unknown_torchvision_weights_name_the_known_ones():
    """Before anything is downloaded."""
    model, recipe = resnet18("model.start_from=torchvision:IMAGENET1K_V7")
    with pytest.raises(RecipeError, match="resnet18 has IMAGENET1K_V1"):
        load_initial_weights(model, recipe.model)


@pytest.mark.parametrize("backbone", ["resnet200", "resnext101_32x4d", "cifar_resnet20"])
def test_networks_that_torchvision_has_no_weights_of_are_named(backbone):
    """Backbones that are not torchvision's."""
    model, _ = made()  # of another backbone: it is not looked at
    recipe = tiny_recipe(f"model.backbone={backbone}", "model.start_from=torchvision:IMAGENET1K_V1")
    with pytest.raises(RecipeError, match=f"torchvision:IMAGENET1K_V1: torchvision has no weights of {backbone};"):
        load_initial_weights(model, recipe.model)


def test_weights_that_torchvision_fetches_fill_both_encoders(monkeypatch, tmp_path):
    """Every tensor of the backbone, fetched with its hash checked; centers stay as they were drawn."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    theirs, asked = torchvision.models.resnet18().state_dict(), []

    def fetched(weights, **options):
        asked.append((weights.name, options))
        return theirs

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", fetched)
    model, recipe = resnet18("model.start_from=torchvision:IMAGENET1K_V1")
    centers = {name: tensor.clone() for name, tensor in model.centers.state_dict().items()}
    load_initial_weights(model, recipe.model)
    assert asked == [("IMAGENET1K_V1", {"progress": False, "check_hash": True})]
    query, key = (e.backbone.network.state_dict() for e in (model.query_encoder, model.key_encoder))
    assert query.keys() == {name for name in theirs if not name.startswith("fc.")}
    assert key.keys() == {name for name in query if "running" not in name and "tracked" not in name}
    for ours in (query, key):
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name
    assert all(torch.equal(tensor, centers[name]) for name, tensor in model.centers.state_dict().items())


@pytest.mark.parametrize("error", [URLError("Name or service not known"), RuntimeError("invalid hash value")])
def test_without_a_network_the_url_and_the_place_for_a_copy_are_named(monkeypatch, tmp_path, error):
    """Nor is a damaged download used."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(weights, **options):
        raise error

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", offline)
    model, recipe = resnet18("model.start_from=torchvision:IMAGENET1K_V1")
    with pytest.raises(RecipeError) as caught:
        load_initial_weights(model, recipe.model)
    assert "cannot fetch https://download.pytorch.org/models/resnet18-f37072fd.pth (" in str(caught.value)
    assert f"put that file to {tmp_path}/hub/checkpoints/resnet18-f37072fd.pth, or name it" in str(caught.value)


def test_ranks_of_a_host_fetch_weights_once(monkeypatch, tmp_path):
    """One after another; who comes later finds them."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    theirs, fetches = torchvision.models.resnet18().state_dict(), []

    def fetched(weights, **options):
        file = tmp_path / "hub" / "checkpoints" / "there"
        if not file.exists():
            fetches.append(weights.name)
            time.sleep(0.05)
            file.touch()
        return theirs

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", fetched)
    made_for_ranks = [resnet18("model.start_from=torchvision:IMAGENET1K_V1") for _ in range(4)]
    with ThreadPoolExecutor(4) as ranks:
        list(ranks.map(lambda each: load_initial_weights(each[0], each[1].model), made_for_ranks))
    assert fetches == ["IMAGENET1K_V1"]


def test_scaled_centers_scale_the_frozen_classifiers_logits():
    """LWS: z_c = scale_c (w_c . x + b_c), 1 at first; the scales alone have a gradient."""
    centers, x = ScaledCenters(6, 5), torch.randn(3, 6)
    weight, bias = centers.linear.weight, centers.linear.bias
    torch.testing.assert_close(centers(x), x @ weight.T + bias)
    with torch.no_grad():
        centers.scale.copy_(torch.tensor([0.5, 1.0, 2.0, -1.0, 0.0]))
    of_classes = [s * (x @ w + b) for s, w, b in zip(centers.scale, weight, bias, strict=True)]
    torch.testing.assert_close(centers(x), torch.stack(of_classes, 1))
    centers(x).square().sum().backward()
    assert [name for name, p in centers.named_parameters() if p.grad is not None] == ["scale"]


def test_last_block_and_batch_norm_alone_are_trained():
    """As published for Places-LT: the last block of layer4, all BatchNorm, heads."""
    model, recipe = resnet18("model.trained=last_block", "model.start_from=somewhere")
    freeze(model, recipe.model)
    trained = {n for n, p in model.query_encoder.backbone.network.named_parameters() if p.requires_grad}
    assert "layer4.1.conv1.weight" in trained
    assert "bn1.weight" in trained
    assert not {"conv1.weight", "layer4.0.conv1.weight"} & trained
    assert model.centers.weight.requires_grad


def test_a_frozen_encoder_stays_in_evaluation_mode():
    """BatchNorm uses what it learnt in the first stage."""
    model, recipe = made("loss.method=cross_entropy", "model.trained=centers", "model.start_from=somewhere")
    freeze(model, recipe.model)
    model.train()
    assert not model.query_encoder.backbone.training
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["centers.weight", "centers.bias"]


def test_frozen_batch_norm_and_a_key_encoder_are_refused_together():
    """Keys are normalised with statistics of a batch; a projection that contrasts is trained with the centers."""
    model, recipe = made("model.trained=centers", "model.start_from=somewhere")
    with pytest.raises(RecipeError, match=r"set model.frozen_batch_norm=training, or key_encoder=none"):
        freeze(model, recipe.model)
    freeze(model, recipe.model.model_copy(update={"frozen_batch_norm": "training"}))
    assert all(
        n.startswith(("query_encoder.projection", "centers")) for n, p in model.named_parameters() if p.requires_grad
    )
    assert any(p.requires_grad for p in model.query_encoder.projection.parameters())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.trained=centers",), "set start_from"),
        (("model.trained=center_scales", "model.start_from=x"), "cannot contrast anything"),
        (("loss.method=supcon", "model.trained=centers", "model.start_from=x"), "supcon trains no centers"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(overrides, message):
    """Frozen random weights; a contrast of a frozen encoder."""
    with pytest.raises(RecipeError, match=message):
        tiny_recipe(*overrides)


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
def test_tau_normalised_weights_are_those_of_the_equation(tau):
    """w / ||w||^tau, row by row; the model's own centers stay."""
    model, _ = made("loss.method=cross_entropy")
    weight = model.centers.weight.detach().clone()
    expected = torch.stack([row / row.norm() ** tau for row in weight])
    torch.testing.assert_close(normalized_weight(weight, tau), expected)
    normalised: Any = tau_normalized(model, tau)
    torch.testing.assert_close(normalised.centers.weight, expected)
    assert normalised.centers.bias.abs().max() == 0
    torch.testing.assert_close(model.centers.weight, weight)


def test_tau_normalisation_needs_one_linear_classifier():
    """Not cosine centers, whose rows are unit already."""
    model, _ = made("loss.method=cross_entropy", "model.centers=cosine")
    with pytest.raises(RecipeError, match="one linear classifier"):
        tau_normalized(model, 0.5)

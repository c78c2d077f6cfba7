"""Weights of timm by their tag: which there are, from where they come, and what is said without a network."""

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from paco_ds.errors import RecipeError
from paco_ds.training.pretrained import published_weights

VIT = "timm:vit_tiny_patch16_224"
TAG = "augreg_in21k_ft_in1k"


@pytest.fixture(autouse=True)
def downloads(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints"


def test_weights_are_fetched_from_the_hub_that_timm_names(monkeypatch, tmp_path):
    """By the repository and file of the tag, as safetensors."""
    asked = []

    def fetched(repo_id, filename, **options):
        asked.append((repo_id, filename))
        save_file({"cls_token": torch.ones(1, 1, 192)}, tmp_path / "there.safetensors")
        return str(tmp_path / "there.safetensors")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetched)
    for start in (f"timm:{TAG}", f"timm:vit_tiny_patch16_224.{TAG}"):
        assert published_weights(start, VIT).keys() == {"cls_token"}
    assert asked == [(f"timm/vit_tiny_patch16_224.{TAG}", "model.safetensors")] * 2


def test_without_a_network_the_url_and_the_place_for_a_copy_are_named(monkeypatch, downloads):
    """A file that is put there is used, and nothing is asked for."""

    def offline(*_, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(RecipeError) as caught:
        published_weights(f"timm:{TAG}", VIT)
    place = downloads / f"vit_tiny_patch16_224.{TAG}.safetensors"
    url = f"https://huggingface.co/timm/vit_tiny_patch16_224.{TAG}/resolve/main/model.safetensors"
    assert str(caught.value).startswith(f"cannot fetch {url} (Name or service not known): where there is no network, ")
    assert f"put that file to {place}, or name it by model.start_from" in str(caught.value)
    save_file({"cls_token": torch.ones(1, 1, 192)}, place)
    assert published_weights(f"timm:{TAG}", VIT).keys() == {"cls_token"}


@pytest.mark.parametrize(
    ("start", "backbone", "message"),
    [
        ("timm:augreg_in21k_ft_in2k", VIT, f"vit_tiny_patch16_224 has .*{TAG}.*; did you mean {TAG}?"),
        ("timm:a1_in1k", "timm:test_vit3", "timm:test_vit3 has "),
        ("timm:a1_in1k", "resnet50", "timm has no weights of resnet50; set model.backbone=timm:NAME"),
    ],
)
def test_unknown_tags_name_the_known_ones(start, backbone, message):
    """Before anything is fetched."""
    with pytest.raises(RecipeError, match=message):
        published_weights(start, backbone)

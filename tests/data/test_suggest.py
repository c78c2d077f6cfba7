"""What is suggested for the class counts of a data set."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paco_ds.config.load import load_recipe
from paco_ds.data.manifest import Manifest, Shard, Split
from paco_ds.data.pack import suggest as suggest_module
from paco_ds.data.pack.card import Imbalance, load_card
from paco_ds.data.pack.command import main
from paco_ds.data.pack.selection import long_tailed_counts
from paco_ds.data.pack.suggest import histogram, suggest


def manifest_of(counts: Any) -> Manifest:
    """A manifest of such a train, without files."""
    counts = tuple(int(count) for count in counts)
    total = sum(counts)
    shard = Shard(name="train-00000", samples=total, bytes=1, sha256="0" * 64, index_bytes=1, index_sha256="0" * 64)
    split = Split(name="train", samples=total, class_counts=counts, bytes=1, shards=(shard,))
    about = {"name": "n", "license": "n", "source": "n", "seed": 0, "mean": (0, 0, 0), "std": (1, 1, 1), "shots": {}}
    return Manifest(classes=tuple(map(str, range(len(counts)))), splits={"train": split}, **about)


@pytest.fixture(autouse=True)
def _no_images(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "damaged" not in request.fixturenames:
        monkeypatch.setattr(suggest_module, "shorter_side", lambda *_: (300, []))


def test_published_settings_come_out_for_the_published_sets() -> None:
    """ImageNet-LT's and iNaturalist's counts: alpha .05 (.04 is the next lower step), queue 8192, 4 x 32, tau .2."""
    imagenet_lt = suggest(manifest_of(long_tailed_counts(np.full(1000, 1280), Imbalance(factor=256, profile="pareto"))))
    inaturalist = suggest(manifest_of([1000, *[53] * 8141]))
    for found in (imagenet_lt, inaturalist):
        assert (found.queue, found.micro_batches, found.micro_batch) == (8192, 4, 32)
        assert (found.temperature, found.key_momentum) == (0.2, 0.999)
    assert imagenet_lt.alpha == pytest.approx(0.05, abs=0.011)
    assert inaturalist.alpha == 0.05


def test_head_of_a_small_set_keeps_its_center() -> None:
    """The shipped profile: alpha K stays at 4.5 or below, where alpha .05 would give more."""
    found = suggest(manifest_of([1000, 599, 359, 215, 129, 77, 46, 27, 16, 10]))
    k_head = 1000 / 2478 * (found.queue + 63)
    assert found.alpha * k_head <= 4.5 < 0.05 * k_head
    assert found.queue == 256
    assert any("alpha K = 3.9" in line for line in found.reasons)


def test_a_very_small_set_still_has_steps_in_an_epoch() -> None:
    """Micro-batches shrink with it, down to what BatchNorm needs."""
    found = suggest(manifest_of([48, 10, 2]))
    assert (found.micro_batches, found.micro_batch) == (2, 4)
    assert "7 steps an epoch" in found.reasons[0]
    assert suggest(manifest_of([400, 100, 20])).micro_batch == 32


def test_histogram_counts_every_class_once() -> None:
    """Bounds double; a class without images has a row of its own."""
    assert histogram([0, 1, 2, 3, 4, 7, 8, 1000]) == [
        ("0", 1, 0),
        ("1", 1, 1),
        ("2-3", 2, 5),
        ("4-7", 2, 11),
        ("8-15", 1, 8),
        ("512-1,023", 1, 1000),
    ]


def test_command_writes_a_card_and_a_recipe_that_load(
    damaged: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For images of 8 pixels; both files belong to these shards; what is there is not replaced unasked."""
    command = ["suggest", str(damaged.directory), "--output", str(tmp_path / "out")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    for expected in (
        "imbalance factor: 6.0 (30 / 5)",
        "shots: 1 many, 1 medium, 1 few of 3 classes",
        "there is no split val",
    ):
        assert expected in printed
    recipe = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert (recipe.data.shards, recipe.data.classes) == (str(damaged.directory), 3)
    assert recipe.views.query.size == 8
    assert Path(recipe.engine.deepspeed).is_file()
    card = load_card(tmp_path / "out" / "card.yaml")
    assert (card.source, card.root, set(card.splits)) == ("webdataset", str(damaged.directory), {"train", "test"})
    assert main(["build", str(tmp_path / "out" / "card.yaml"), "--output", str(tmp_path / "again")]) == 0
    assert main(command) == 2
    assert "card.yaml exists" in capsys.readouterr().err


def test_recipe_for_photographs_loads(damaged: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ResNet-50 with the published views."""
    monkeypatch.setattr(suggest_module, "shorter_side", lambda *_: (300, []))
    assert main(["suggest", str(damaged.directory), "--output", str(tmp_path / "out")]) == 0
    recipe = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert (recipe.model.backbone, recipe.views.query.name, recipe.views.key.name) == ("resnet50", "randcls", "sim")

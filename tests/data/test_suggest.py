"""What is suggested for the class counts of a data set."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np
import pytest

from paco_ds.config.load import load_recipe
from paco_ds.data.manifest import Manifest, Shard, Split
from paco_ds.data.pack import command as command_module
from paco_ds.data.pack import suggest as suggest_module
from paco_ds.data.pack.card import Imbalance, load_card
from paco_ds.data.pack.command import main
from paco_ds.data.pack.selection import long_tailed_counts
from paco_ds.data.pack.suggest import WEIGHTS, Sampled, card_of, command_of, histogram, suggest
from paco_ds.data.shard import ShardReader
from paco_ds.data.storage import as_storage
from paco_ds.data.stream.decode import decode

PHOTOGRAPHS = Sampled(300, (0.4, 0.4, 0.4), (0.2, 0.2, 0.2), 64)


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
        monkeypatch.setattr(suggest_module, "sample_images", lambda *_: PHOTOGRAPHS)


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


def test_few_photographs_are_offered_pretrained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not ImageNet-LT's number, and not small pictures; loader processes leave a core of each rank's to itself."""
    monkeypatch.setattr(suggest_module.os, "sched_getaffinity", lambda _: range(24))
    monkeypatch.setattr(suggest_module, "accelerators", lambda: 4)
    few = suggest(manifest_of([400, 100, 20]))
    assert (few.start_from, few.workers) == (WEIGHTS, 11)
    assert any(f"--set model.start_from={WEIGHTS}" in line for line in few.reasons)
    assert suggest(manifest_of([100_000, 10_000])).start_from is None
    monkeypatch.setattr(suggest_module, "sample_images", lambda *_: Sampled(32, (0.5,) * 3, (0.2,) * 3, 64))
    assert suggest(manifest_of([400, 100, 20])).start_from is None


def test_the_command_is_one_of_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many ranks as GPUs; the checkout's script where nothing is installed."""
    found = suggest(manifest_of([400, 100, 20]))
    monkeypatch.setattr(suggest_module, "accelerators", lambda: 2)
    monkeypatch.setattr(suggest_module.shutil, "which", lambda _: "/bin/paco-train")
    assert command_of(Path("my sets/recipe.yaml"), found) == (
        f"paco-train --ranks 2 --config 'my sets/recipe.yaml' --set model.start_from={WEIGHTS} --output runs/suggested"
    )
    monkeypatch.setattr(suggest_module, "accelerators", lambda: 0)
    monkeypatch.setattr(suggest_module.shutil, "which", lambda _: None)
    script = command_of(Path("r.yaml"), found).split()[1]
    assert Path(script).name == "train.py"
    assert Path(script).is_file()


def test_ranks_are_as_many_as_can_share_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are refused: 2 micro-batches on 8 GPUs are for 2 ranks, 4 on 3 GPUs for 2."""
    for counts, gpus, ranks in (([400, 100, 20], 8, 2), ([50_000, 500], 3, 2), ([50_000, 500], 8, 4)):
        monkeypatch.setattr(suggest_module, "accelerators", lambda gpus=gpus: gpus)
        found = suggest(manifest_of(counts))
        assert f" --ranks {ranks} " in command_of(Path("r.yaml"), found)
        assert any(f"cores for {ranks} ranks" in line for line in found.reasons)


@pytest.mark.parametrize(
    ("splits", "advice", "trains"),
    [
        (("train", "val"), "no split test: .* build with --test-share to", True),
        (("train", "test"), "no split val: .* build with --validation-share to", True),
        (("train",), "no split val and no test: .* build with --validation-share and --test-share to", False),
    ],
)
def test_a_missing_split_is_named_with_the_option_that_makes_it(
    splits: tuple[str, ...],
    advice: str,
    trains: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A command that trains is given only where the recipe can be evaluated."""
    manifest = manifest_of([40, 20])
    train = manifest.split("train")
    made = {name: train.model_copy(update={"name": name}) for name in splits}
    manifest = manifest.model_copy(update={"splits": made})
    manifest._storage = as_storage(tmp_path)
    monkeypatch.setattr(command_module, "load_manifest", lambda _: manifest)
    assert main(["suggest", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert re.search(advice, "\n".join(said))
    assert said[-1].startswith("train: paco-train " if trains else "the recipe needs one of them")


def test_mean_and_deviation_are_those_of_the_pixels(damaged: Manifest) -> None:
    """Of every channel, by hand."""
    reader = ShardReader(damaged.storage, damaged.split("train"))
    pixels = np.stack([decode(reader.read(number), 10**6) for number in range(len(reader))]).reshape(-1, 3) / 255
    sampled = suggest_module.sample_images(damaged, "train")
    assert (sampled.shorter_side, sampled.read) == (8, len(reader))
    assert sampled.mean == pytest.approx(pixels.mean(0), abs=1e-3)
    assert sampled.std == pytest.approx(pixels.std(0), abs=1e-3)


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
    assert (recipe.engine.deepspeed, recipe.engine.precision) == ("auto", "auto")
    card = load_card(tmp_path / "out" / "card.yaml")
    assert (card.source, card.root, set(card.splits)) == ("webdataset", str(damaged.directory), {"train", "test"})
    assert main(["build", str(tmp_path / "out" / "card.yaml"), "--output", str(tmp_path / "again")]) == 0
    assert main(command) == 2
    assert "card.yaml exists" in capsys.readouterr().err


def test_the_card_is_of_the_shards_of_the_manifest() -> None:
    """`add` puts later ones beside them; a name of two lines would end a comment."""
    manifest = manifest_of([3, 2])
    (shard,) = manifest.split("train").shards
    for numbers, pattern in (
        ((0,), "train-00000.tar"),
        ((0, 1, 2), "train-{00000..00002}.tar"),
        ((9, 10), "train-{00009..00010}.tar"),
        ((0, 2), "{train-00000,train-00002}.tar"),
    ):
        shards = [shard.model_copy(update={"name": f"train-{number:05d}"}) for number in numbers]
        split = manifest.split("train").model_copy(update={"shards": tuple(shards)})
        assert suggest_module._tars(split) == pattern
        assert [*braceexpand.braceexpand(pattern)] == [each.file for each in shards]


def test_a_name_of_two_lines_makes_a_card_that_can_be_read(damaged: Manifest, tmp_path: Path) -> None:
    """It stands in a comment too."""
    manifest = damaged.model_copy(update={"name": "birds\n2024"})
    path, _ = suggest_module.write_files(manifest, suggest(damaged), tmp_path, overwrite=False)
    assert load_card(path).name == "birds\n2024"


def test_a_terminal_without_its_letters_is_no_error(damaged: Manifest, tmp_path: Path) -> None:
    """The bars of the histogram are none of ASCII."""
    words = ["suggest", str(damaged.directory), "--output", str(tmp_path / "out")]
    program = "import sys; from paco_ds.data.pack.command import main; sys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", program, *words], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "images of a class" in done.stdout


def test_recipe_for_photographs_loads(damaged: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ResNet-50 with the published views."""
    monkeypatch.setattr(suggest_module, "sample_images", lambda *_: PHOTOGRAPHS)
    assert main(["suggest", str(damaged.directory), "--output", str(tmp_path / "out")]) == 0
    recipe = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert (recipe.model.backbone, recipe.views.query.name, recipe.views.key.name) == ("resnet50", "randcls", "sim")


@pytest.mark.parametrize("background", [None, "#ffffff"])
def test_the_suggested_card_keeps_the_background(background: str | None) -> None:
    """Shards packed again have no transparent parts left, and predictions need the color."""
    manifest = manifest_of([30, 20]).model_copy(update={"background": background})
    manifest._storage = as_storage("s3://bucket/shards")
    assert card_of(manifest, suggest(manifest)).get("background") == background

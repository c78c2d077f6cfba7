"""More images and classes for finished shards: a new revision, the old shards as they were."""

import shutil
from pathlib import Path

import pytest

from paco_ds.data.manifest import Manifest, load_manifest
from paco_ds.data.pack import add as add_module
from paco_ds.data.pack.add import add_images
from paco_ds.data.pack.build_plan import BuildOptions
from paco_ds.data.pack.card import card_of_options, changed, folder_card, load_card
from paco_ds.data.pack.check import check_shards
from paco_ds.data.pack.command import main
from paco_ds.data.pack.shards import build_shards
from paco_ds.data.shard import ShardReader
from paco_ds.errors import DataError
from tests.data.tiny import encoded, flip_byte

SMALL = BuildOptions(shard_bytes=8_000)


def images(root: Path, **counts: int) -> Path:
    """A folder of train images per class, no two alike."""
    for name, count in counts.items():
        folder = root / "train" / name
        folder.mkdir(parents=True)
        for number in range(count):
            (folder / f"{number}.png").write_bytes(encoded(".png", 16, hash_of(root.name, name, number)))
    return root


def hash_of(*parts: object) -> int:
    """A seed that is another for other parts."""
    return int.from_bytes("/".join(map(str, parts)).encode(), "little") % 2**32


@pytest.fixture
def first(tmp_path: Path) -> Manifest:
    """Shards of 9 bees and 6 emus."""
    root = images(tmp_path / "first", bee=9, emu=6)
    return build_shards(folder_card(root), root, tmp_path / "shards", SMALL)


def add(manifest: Manifest, root: Path, options: BuildOptions = SMALL) -> Manifest:
    """Add a folder."""
    added = add_images(manifest.directory, folder_card(root), root, options)
    assert added is not None
    return added


def test_added_images_follow_the_old_ones(first: Manifest, tmp_path: Path) -> None:
    """Classes are matched by name, new ones come last, ids and keys go on, every old file keeps its bytes."""
    before = {path.name: path.read_bytes() for path in first.directory.iterdir()}
    second = add(first, images(tmp_path / "second", ant=4, emu=3))
    after = {path.name: path.read_bytes() for path in first.directory.iterdir()}
    assert second.classes == ("bee", "emu", "ant")
    assert second.split("train").class_counts == (9, 9, 4)
    assert second.revision == 2
    assert second.sha256 != first.sha256
    assert after["manifest-1.json"] == before.pop("manifest.json")
    assert {name: after[name] for name in before} == before
    reader = ShardReader(second.directory, second.split("train"))
    assert [reader.read(i).key for i in range(22)] == [f"train-{i:08d}" for i in range(22)]
    assert reader.labels()[:15].max() == 1
    assert check_shards(second) == []
    assert not (first.directory / ".build").exists()


def test_run_on_the_manifest_before_can_go_on(first: Manifest, tmp_path: Path) -> None:
    """The kept file is a manifest of its own, with the digest that the run knows."""
    add(first, images(tmp_path / "second", emu=3))
    kept = load_manifest(first.directory / "manifest-1.json")
    assert kept.sha256 == first.sha256
    assert ShardReader(kept.storage, kept.split("train")).read(0).key == "train-00000000"


def test_the_same_images_are_not_added_twice(first: Manifest, tmp_path: Path) -> None:
    """Nor those that the build had."""
    second = add(first, images(tmp_path / "second", emu=3))
    for root in ("first", "second"):
        with pytest.raises(DataError, match=rf"images of {root} are in .* already"):
            add(second, tmp_path / root)


def test_other_pixels_in_arrays_of_the_same_name_are_added(tiny_card: Path, tmp_path: Path) -> None:
    """Another batch of as many images with the same labels; the same one is refused, from another folder too."""
    card, root = load_card(tiny_card), tmp_path / "images"
    shutil.copytree(tiny_card.parent / "images", root)
    first = build_shards(card, root, tmp_path / "shards")
    shutil.move(root, tmp_path / "moved")
    with pytest.raises(DataError, match=r"these images of tiny are in .* already"):
        add_images(first.directory, card, tmp_path / "moved", SMALL)
    for file in ("train-images", "test-images"):
        flip_byte(tmp_path / "moved" / file, 100)
    added = add_images(first.directory, card, tmp_path / "moved", SMALL)
    assert added is not None
    assert added.split("train").samples == 2 * first.split("train").samples


def test_stopped_add_goes_on(first: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before the manifest: the old one still holds. Stopped after it: it is done."""
    root = images(tmp_path / "second", ant=4, emu=30)
    shutil.copytree(first.directory, tmp_path / "copy")
    expected = add(load_manifest(tmp_path / "copy"), root)

    class Stop(Exception):  # noqa: N818
        pass

    def stop(*_: object) -> None:
        raise Stop

    for place in (add_module, "paco_ds.data.pack.shards"):
        name = "_merged" if place is add_module else "clear_state"
        monkeypatch.setattr(f"{place if isinstance(place, str) else place.__name__}.{name}", stop)
        with pytest.raises(Stop):
            add(first, root)
        monkeypatch.undo()
        if place is add_module:
            assert load_manifest(first.directory).sha256 == first.sha256
    assert add(first, root).sha256 == expected.sha256
    assert not (first.directory / ".build").exists()


def test_new_class_needs_a_training_image(first: Manifest, tmp_path: Path) -> None:
    """A class that only val has cannot be learnt."""
    images(tmp_path / "second", ant=4)
    (tmp_path / "second" / "train").rename(tmp_path / "second" / "val")
    card = card_of_options({"source": "folder", "root": str(tmp_path / "second"), "val": "val"})
    with pytest.raises(DataError, match="no training image of the new class ant"):
        add_images(first.directory, card, tmp_path / "second", SMALL)
    assert load_manifest(first.directory).sha256 == first.sha256


def test_long_tailed_part_of_an_addition_is_refused(first: Manifest, tmp_path: Path) -> None:
    """It would be no part of the whole."""
    root = images(tmp_path / "second", ant=4)
    card = changed(folder_card(root), imbalance={"factor": 10})
    with pytest.raises(DataError, match="imbalance selects from a whole train split"):
        add_images(first.directory, card, root, SMALL)


def test_images_that_the_shards_hold_are_said(
    first: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By their bytes, whatever they are called: old images among the new ones, and those of train in val."""
    root = images(tmp_path / "second", emu=1)
    old = sorted((tmp_path / "first/train/emu").iterdir())
    (root / "val/emu").mkdir(parents=True)
    for number, path in enumerate(old[:2]):
        shutil.copy(path, root / f"val/emu/copy{number}.png")
    shutil.copy(tmp_path / "first/train/emu/3.png", root / "train/emu/again.png")
    assert main(["add", str(first.directory), "--source", "folder", "--root", str(root), "--workers", "1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    shards = f"in train of {first.directory} already"
    assert f"WARNING: 1 of 2 images of train are {shards}: train/emu/again.png" in said
    assert f"WARNING: 2 of 2 images of val are {shards}: val/emu/copy0.png, val/emu/copy1.png" in said


def test_a_new_class_that_looks_like_an_old_one_is_said(
    first: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It counts as a class of its own."""
    root = str(images(tmp_path / "second", Bee=4))
    assert main(["add", str(first.directory), "--source", "folder", "--root", root, "--workers", "1"]) == 0
    assert "classes that look alike, and count as different: 'bee' and 'Bee'" in capsys.readouterr().out


def test_new_classes_are_said(first: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that is spelt otherwise makes one."""
    root = str(images(tmp_path / "second", bees=1, emu=1))
    assert main(["add", str(first.directory), "--source", "folder", "--root", root, "--workers", "1"]) == 0
    assert "new classes, which the shards have not yet: bees\n" in capsys.readouterr().out


def test_numbers_are_no_new_classes_of_shards_with_names(first: Manifest, tmp_path: Path) -> None:
    """A list without --classes has labels alone."""
    (images(tmp_path / "second", bee=1) / "t.txt").write_text("train/bee/0.png 0\n")
    card = card_of_options({"source": "list", "root": str(tmp_path / "second"), "train": "t.txt"})
    with pytest.raises(DataError, match=r"classes 0 are numbers, and those of .* are names: name them, as by"):
        add_images(first.directory, card, tmp_path / "second", SMALL)


def test_images_are_added_to_a_folder_and_not_to_a_manifest(first: Manifest) -> None:
    """An old manifest is no place for new shards."""
    place = first.directory / "manifest-1.json"
    with pytest.raises(DataError, match=f"manifest-1.json is a manifest, .*: give {first.directory}$"):
        add_images(place, folder_card(first.directory), first.directory, SMALL)


def test_command_says_the_revision(first: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`build_shards.py add DIR --source folder --root ROOT`."""
    root = str(images(tmp_path / "second", ant=4))
    assert main(["add", str(first.directory), "--source", "folder", "--root", root, "--workers", "1"]) == 0
    assert "revision 2; the previous manifest is kept beside it" in capsys.readouterr().out


def test_another_background_is_refused(first: Manifest, tmp_path: Path) -> None:
    """Transparent parts of a set have one color; a set without one has no word of it in its manifest."""
    assert "background" not in (first.directory / "manifest.json").read_text()
    assert "background" not in first.trained_data().state()
    root = images(tmp_path / "second", bee=2)
    white = changed(folder_card(root), background="white")
    with pytest.raises(DataError, match=r"background #ffffff of second: .* has none in its manifest.*leave it out"):
        add_images(first.directory, white, root, SMALL)
    filled = build_shards(white, root, tmp_path / "filled", SMALL)
    more = images(tmp_path / "third", bee=3)
    with pytest.raises(DataError, match=r"has background #ffffff in its manifest, .* give --background '#ffffff'"):
        add_images(filled.directory, folder_card(more), more, SMALL)
    added = add_images(filled.directory, changed(folder_card(more), background="#FFFFFF"), more, SMALL)
    assert added is not None
    assert added.background == "#ffffff"

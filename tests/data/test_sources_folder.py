"""Folder trees are never guessed in silence: what is taken, what is left out aloud, and what is refused."""

import os
import unicodedata
from pathlib import Path

import pytest

from paco_ds.data.names import is_hidden, split_called
from paco_ds.data.pack.card import Card, card_of_options, changed, folder_card
from paco_ds.data.pack.read import list_source, read_source
from paco_ds.data.pack.root import Root
from paco_ds.data.pack.source import Source
from paco_ds.errors import DataError


def files(root: Path, *names: str) -> Path:
    """Put files under root, each holding its own name."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.fsencode(name))
    return root


def listed(root: Path, **pages: str) -> Source:
    return read_source(card_of_options({"source": "folder", "root": str(root), **pages}), root)


def counts(source: Source) -> dict[str, list[int]]:
    return {name: samples.counts(len(source.classes)).tolist() for name, samples in source.splits.items()}


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (("Train", "Test"), {"train": "Train", "test": "Test"}),
        (("training", "validation"), {"train": "training", "val": "validation"}),
        (("train", "valid", "test"), {"train": "train", "val": "valid", "test": "test"}),
        (("training_set", "test_set"), {"train": "training_set", "test": "test_set"}),
        (("TRAIN", "Val images"), {"train": "TRAIN", "val": "Val images"}),
        (("cat", "model_train"), {"train": "."}),
    ],
)
def test_usual_names_of_splits_are_taken(tmp_path, folders, splits):
    """In any case; a class whose name has such a word in it stays a class."""
    files(tmp_path, *(f"{folder}/cat/1.jpg" for folder in folders))
    assert {name: split.folder for name, split in folder_card(tmp_path).splits.items()} == splits


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("test/cat/1.jpg",), "has test and no folder of training images: name it with --train"),
        (("train/a/1.jpg", "val/a/1.jpg", "valid/a/1.jpg"), "has val and valid, both called like val"),
        (("Train/a/1.jpg", "train/a/1.jpg"), "has Train and train, both called like train"),
        (
            ("cat/train/1.jpg", "cat/val/2.jpg", "dog/train/3.jpg", "dog/val/4.jpg"),
            "cat holds splits, as all class folders do: arrange them as train/CLASS and val/CLASS",
        ),
        (("set/train/a/1.jpg", "set/test/a/2.jpg"), "set holds splits, and would be the only class: give it as --root"),
    ],
)
def test_splits_that_are_not_clear_are_refused(tmp_path, names, message):
    """With the option that says it."""
    with pytest.raises(DataError, match=message):
        listed(files(tmp_path, *names))


def test_a_class_called_like_a_split_is_told_how_to_be_one(tmp_path):
    """By a card; the message says what is assumed."""
    files(tmp_path, "bus/1.jpg", "car/2.jpg", "train/3.jpg")
    message = "train has no folder: .*; by its name it is taken for a split: if it is a class, write a card"
    with pytest.raises(DataError, match=message):
        listed(tmp_path)
    card = changed(folder_card(tmp_path), splits={"train": {"folder": "."}}, classes=["bus", "car", "train"])
    assert counts(read_source(card, tmp_path)) == {"train": [1, 1, 1]}


def test_a_class_may_have_a_part_called_like_a_split(tmp_path):
    """If other classes have none."""
    assert counts(listed(files(tmp_path, "toy/train/1.jpg", "doll/2.jpg"))) == {"train": [1, 1]}


def test_folders_called_like_splits_are_no_classes(tmp_path):
    """Not if the root is given as train either; a card may name them."""
    files(tmp_path, "train/a/1.jpg", "val/a/1.jpg")
    with pytest.raises(DataError, match="holds train, val, called like splits and not like classes"):
        listed(tmp_path, train=".")
    card = changed(folder_card(tmp_path), splits={"train": {"folder": "."}}, classes=["train", "val"])
    assert counts(read_source(card, tmp_path)) == {"train": [1, 1]}


def test_pages_that_are_given_need_no_usual_names(tmp_path):
    files(tmp_path, "a_train/x/1.jpg", "val/x/2.jpg", "valid/x/3.jpg")
    assert counts(listed(tmp_path, train="a_train", val="valid")) == {"train": [1], "val": [1]}


def test_what_lies_beside_splits_and_classes_is_said(tmp_path):
    """Other folders of the root, images in no class folder."""
    files(tmp_path, "train/a/1.jpg", "train/2.jpg", "train/3.png", "train/read.me", "masks/a/1.jpg")
    assert listed(tmp_path).notes == [
        "left out, images directly in train and in no class folder: 2",
        "left out, folders beside those of the splits: masks",
    ]


HIDDEN = (
    "train/a/.ipynb_checkpoints/1-checkpoint.jpg",
    "train/a/b/.thumbnails/1.jpg",
    "train/a/._1.jpg",
    "train/a/@eaDir/1.jpg",
    "train/__MACOSX/a/1.jpg",
    "train/.cache/x/1.jpg",
)


@pytest.mark.parametrize("name", HIDDEN)
def test_what_is_hidden_is_no_image_at_any_depth(tmp_path, name):
    source = listed(files(tmp_path, "train/a/1.jpg", name))
    assert (source.classes, counts(source)) == (("a",), {"train": [1]})
    assert is_hidden(name)
    assert source.notes == ["left out, hidden files and folders in train: 1"]


def test_what_is_hidden_is_left_out_behind_a_url_too(tmp_path):
    """Where folders are names of objects."""
    import fsspec

    memory = fsspec.filesystem("memory")
    try:
        for name in ("train/a/1.jpg", *HIDDEN):
            memory.pipe(f"/in/{name}", b"x")
        root = Root("memory://in")
        assert root.folders("train") == ["a"]
        assert list(root.files("train/a")) == ["train/a/1.jpg"]
        assert [s.folder for s in folder_card("memory://in").splits.values()] == ["train"]
        flat = list_source(folder_card("memory://in/train"), "memory://in/train")
        assert (flat.classes, list(flat.splits["train"].names)) == (("a",), ["a/1.jpg"])
    finally:
        memory.store.clear()


@pytest.mark.parametrize("to", [".", "..", "../..", "../dog", "../dog/puppies"])
def test_a_link_that_leads_back_is_not_followed(tmp_path, to):
    """To itself, to a folder above, to another class or a part of it: their images are listed where they are."""
    files(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", "train/dog/puppies/3.jpg", "val/cat/4.jpg", "val/dog/5.jpg")
    (tmp_path / "train" / "cat" / "link").symlink_to(to)
    source = listed(tmp_path)
    assert counts(source) == {"train": [1, 2], "val": [1, 1]}
    assert source.notes == [
        f"left out, since their images are listed elsewhere: {tmp_path}/train/cat/link",
    ]


def test_links_to_elsewhere_are_followed_once(tmp_path):
    """A data set that is put together by links; the same folder a second time is left out."""
    root = files(tmp_path / "in", "train/cat/1.jpg", "train/dog/2.jpg")
    files(tmp_path, "more/3.jpg")
    (root / "train" / "cat" / "more").symlink_to(tmp_path / "more")
    (root / "train" / "cat" / "too").symlink_to(tmp_path / "more")
    (root / "train" / "eel").symlink_to(files(tmp_path, "eels/4.jpg") / "eels")
    source = listed(root)
    assert list(source.splits["train"].names)[:2] == ["train/cat/1.jpg", "train/cat/more/3.jpg"]
    assert counts(source) == {"train": [2, 1, 1]}
    assert source.notes == [f"left out, since their images are listed elsewhere: {root}/train/cat/too"]


def test_a_folder_that_is_two_classes_is_refused(tmp_path):
    files(tmp_path, "train/cat/1.jpg")
    (tmp_path / "train" / "kitty").symlink_to("cat")
    with pytest.raises(DataError, match="train/kitty is the folder of another class too: remove one of the two"):
        listed(tmp_path)


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ("train/eel", "train/eel is a link to /mnt/gone, which is missing: mount or copy it, or remove the link"),
        ("val", "there is no folder .*/val"),
    ],
)
def test_a_link_that_leads_nowhere_counts_as_a_folder(tmp_path, link, message):
    """A class or a split on a disk that is not mounted is missed, not left out."""
    files(tmp_path, "train/cat/1.jpg")
    (tmp_path / link).symlink_to("/mnt/gone")
    with pytest.raises(DataError, match=message):
        listed(tmp_path)


def test_a_class_of_other_formats_is_told_from_an_empty_one(tmp_path):
    """By the number and the endings of the files that were left out."""
    files(tmp_path, "train/cat/1.tiff", "train/cat/2.TIFF", "train/cat/3.avif", "train/dog/1.jpg")
    message = r"of cat \(left out, not images by their ending: 1 .avif, 2 .tiff\): add some, as JPEG or PNG"
    with pytest.raises(DataError, match=message):
        listed(tmp_path)


def test_files_beside_class_folders_are_counted_by_ending(tmp_path):
    """An archive may hold a class that was not unpacked."""
    files(tmp_path, "train/cat/1.jpg", "train/eel.zip", "train/fox.tar", "train/LICENSE", "train/cat/2.txt")
    assert listed(tmp_path).ignored == {".zip": 1, ".tar": 1, "(no ending)": 1, ".txt": 1}


@pytest.mark.parametrize("folder", ["train", "train/a", "train/a/b"])
def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch, folder):
    """os.walk would pass over it."""
    files(tmp_path, "train/a/1.jpg", "train/a/b/2.jpg")
    scan = os.scandir

    def denied(place):
        if str(place).endswith(f"/{folder}"):
            raise PermissionError(13, "Permission denied", str(place))
        return scan(place)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(DataError, match=rf"folder .*/{folder} cannot be read: Permission denied"):
        listed(tmp_path)


def test_a_rare_class_may_lack_a_folder_in_val(tmp_path):
    """Said aloud; an unknown one is refused, as is one that train lacks."""
    root = files(tmp_path, "train/cat/1.jpg", "train/rare/2.jpg", "val/cat/3.jpg")
    source = listed(root)
    assert counts(source) == {"train": [1, 1], "val": [1, 0]}
    assert source.notes == ["split val has no folder of rare, and so no image of them"]
    files(tmp_path, "val/new/4.jpg")
    with pytest.raises(DataError, match=r"split val .*not known new"):
        listed(root)


def decomposed(name: str) -> str:
    return unicodedata.normalize("NFD", name)


def test_names_of_classes_are_compared_in_nfc(tmp_path):
    """macOS writes é as e and an accent."""
    files(tmp_path, f"train/{decomposed('café')}/1.jpg", "train/tea/2.jpg", "val/café/3.jpg", "val/tea/4.jpg")
    source = listed(tmp_path)
    assert (source.classes, counts(source)) == (("café", "tea"), {"train": [1, 1], "val": [1, 1]})
    files(tmp_path, "train/café/5.jpg")
    with pytest.raises(DataError, match="train has two folders called 'café', in two Unicode forms: rename one"):
        listed(tmp_path)


def test_labels_of_csv_files_are_compared_in_nfc_and_paths_normalised(tmp_path):
    """So that one class is one, and an image that is listed twice is found."""
    files(tmp_path, "1.jpg", "2.jpg")
    (tmp_path / "train.csv").write_text(f"path,label\n1.jpg,café\n./2.jpg,{decomposed('café')}\n.//1.jpg,café\n")
    card: Card = card_of_options({"source": "csv", "root": str(tmp_path), "train": "train.csv"})
    source = read_source(card, tmp_path)
    assert source.classes == ("café",)
    assert list(source.splits["train"].names) == ["1.jpg", "2.jpg"]
    assert [str(bad) for bad in source.bad] == ["1.jpg: listed_twice"]


def test_classes_of_a_card_are_compared_in_nfc(tmp_path):
    """With the labels of a CSV file and with folders."""
    files(tmp_path, "1.jpg", "train/café/1.jpg")
    (tmp_path / "train.csv").write_text("path,label\n1.jpg,café\n")
    classes = [decomposed("café")]
    by_csv = card_of_options({"source": "csv", "root": str(tmp_path), "train": "train.csv"})
    for card in (changed(by_csv, classes=classes), changed(folder_card(tmp_path), classes=classes)):
        assert read_source(card, tmp_path).classes == ("café",)


@pytest.mark.parametrize("name", ["cat", "tests of patience", "valley", "evaluated", "model_train", "val d'isère"])
def test_names_of_classes_are_not_called_like_splits(name):
    assert split_called(name) is None

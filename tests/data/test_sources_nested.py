"""Folders that are taken for classes: splits and a folder around classes are told from classes."""

import pytest

from paco_ds.data.names import split_in
from paco_ds.data.pack.card import changed, folder_card, make_card
from paco_ds.data.pack.read import read_source
from paco_ds.errors import DataError
from tests.data.test_sources_folder import counts, files, listed


def tree(root, folders, classes):
    """An image in each class of each folder."""
    return files(root, *(f"{folder}/{name}/1.jpg" for folder in folders for name in classes))


@pytest.mark.parametrize(
    ("folders", "options"),
    [
        (("cars_train", "cars_test"), "--train cars_train --test cars_test"),
        (("ILSVRC2012_img_train", "ILSVRC2012_img_val"), "--train ILSVRC2012_img_train --val ILSVRC2012_img_val"),
        (("trainingData", "testData"), "--train trainingData --test testData"),
        (("train.v1", "valid.v1"), "--train train.v1 --val valid.v1"),
        (("trn", "tst"), "--train trn --test tst"),
        (("fold 0", "fold 1"), "--train 'fold 0' --val 'fold 1'"),
    ],
)
def test_folders_of_the_same_names_called_like_splits_are_splits(tmp_path, folders, options):
    """With the options that say which is which; some classes may be in one only. A card may name them as classes."""
    tree(tmp_path, folders, ("cat", "dog"))
    files(tmp_path, f"{folders[0]}/rare/1.jpg")
    with pytest.raises(DataError, match=f"hold folders of the same names .* such as {options}; if they are classes"):
        listed(tmp_path)
    card = changed(folder_card(tmp_path), classes=list(folders))
    assert counts(read_source(card, tmp_path)) == {"train": [3, 2]}


def test_many_shared_names_are_classes_whatever_the_folders_are_called(tmp_path):
    """Office-Home's Art, Clipart, Product and World of 65 classes each."""
    kinds = [f"kind {chr(97 + number)}" for number in range(12)]
    with pytest.raises(
        DataError, match=r"hold folders of the same names .* such as --train Art --val Clipart; if they"
    ):
        listed(tree(tmp_path, ("Art", "Clipart"), kinds))


@pytest.mark.parametrize(
    ("names", "labels", "said"),
    [
        (("cat/2019/1.jpg", "cat/2020/2.jpg", "dog/2019/3.jpg", "dog/2020/4.jpg"), [2, 2], "cat, dog hold folders"),
        (("cat/a/1.jpg", "cat/b/2.jpg", "dog/c/3.jpg", "dog/d/4.jpg"), [2, 2], None),
        (("cat/a/1.jpg", "cat/b/2.jpg", "dog/a/3.jpg", "dog/4.jpg"), [2, 2], None),
        (("n01/images/1.jpg", "n02/images/2.jpg"), [1, 1], None),
        (("cat_train/1.jpg", "cat_test/2.jpg"), [1, 1], "the classes are called like splits, cat_test, cat_train"),
        (("cat/2019/1.jpg", "cat/2020/2.jpg"), [2], "cat is the only class, and its images lie in 2019, 2020"),
        (("cat/photos/1.jpg", "cat/masks/1.txt"), [1], None),
        (("freight_train/front/1.jpg", "mail_train/front/2.jpg"), [1, 1], None),
    ],
)
def test_classes_may_hold_folders(tmp_path, names, labels, said):
    """What is in doubt is said."""
    source = listed(files(tmp_path, *names))
    assert counts(source) == {"train": labels}
    assert [said in note for note in source.notes] == [True] * (said is not None)


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (
            ("Pets/Cat/1.jpg", "Pets/Dog/2.jpg"),
            {},
            "Pets is the only class, and its images lie in Cat, Dog: .*/Pets as ",
        ),
        (
            ("a/b/Cat/1.jpg", "a/b/Dog/2.jpg"),
            {},
            "a is the only class, .* in Cat, Dog: .* give .*/a/b as --root; if it",
        ),
        (("x/Pets/Cat/1.jpg", "x/Pets/Dog/2.jpg"), {"train": "x"}, "give x/Pets as --train"),
    ],
)
def test_one_folder_around_the_classes_is_no_class(tmp_path, names, options, message):
    """The root is one level too high, or more."""
    with pytest.raises(DataError, match=message):
        listed(files(tmp_path, *names), **options)


def test_a_link_that_leads_nowhere_within_a_class_is_refused(tmp_path):
    """It may be a folder of images on a disk that is not mounted; a hidden one, such as an editor's lock, is not."""
    files(tmp_path, "train/cat/1.jpg")
    (tmp_path / "train/cat/.#lock").symlink_to("/gone/lock")
    assert counts(listed(tmp_path)) == {"train": [1]}
    (tmp_path / "train/cat/more").symlink_to("/gone/cats")
    (tmp_path / "train").rename(tmp_path / "00000_in")
    about = {"name": "n", "license": "n", "splits": {"train": {"folder": "."}}}
    for source in ("folder", "inaturalist"):
        with pytest.raises(DataError, match="more is a link to /gone/cats, which is missing: mount or copy it"):
            read_source(make_card({"source": source, **about}, "card"), tmp_path)


def test_folders_beside_splits_are_said_behind_a_url_too():
    import fsspec

    memory = fsspec.filesystem("memory")
    try:
        for name in ("train/a/1.jpg", "dev/a/2.jpg"):
            memory.pipe(f"/in/{name}", b"x")
        assert read_source(folder_card("memory://in"), "memory://in").notes == [
            "left out, folders beside those of the splits: dev"
        ]
    finally:
        memory.store.clear()


@pytest.mark.parametrize("name", ["cat", "trains", "valley", "tester", "train_and_test", "2019"])
def test_names_that_say_no_split(name):
    assert split_in(name) is None

"""Lists of class names: numbered lines are no names, and a list that disagrees with the source swaps no classes."""

import json

import pytest

from paco_ds.data.pack.card import card_of_options, changed, make_card
from paco_ds.data.pack.class_list import class_names
from paco_ds.data.pack.read import read_source
from paco_ds.data.pack.root import Root
from paco_ds.errors import DataError
from tests.data.test_sources_folder import files
from tests.data.test_sources_tars import JPG, tar


def names_of(folder, text):
    (folder / "names.txt").write_text(text)
    notes = []
    return class_names("names.txt", Root(folder), notes), notes


@pytest.mark.parametrize(
    ("text", "names", "first"),
    [
        ("0 cat\n1 great owl\n", ("cat", "great owl"), 0),
        ("1 001.Albatross\n2 002.Auklet\n", ("001.Albatross", "002.Auklet"), 1),
        ("/a/airfield 0\n/b/bar 1\n", ("/a/airfield", "/b/bar"), 0),
        ("0,cat\n1,dog\n", ("cat", "dog"), 0),
        ("1. cat\n2. dog\n", ("cat", "dog"), 1),
    ],
)
def test_numbers_that_are_positions_are_left_out_aloud(tmp_path, text, names, first):
    """Of CUB-200's and Places365's files."""
    assert names_of(tmp_path, text) == (
        names,
        [f"the numbers of the lines of {tmp_path}/names.txt, from {first}, are left out of the class names"],
    )


@pytest.mark.parametrize("text", ["1 cat\n0 dog\n", "cat 1\ndog 0\n", "3 cat\n9 dog\n"])
def test_numbers_that_are_not_positions_are_refused(tmp_path, text):
    """They say the label, and the line is another; a card can list such names."""
    with pytest.raises(
        DataError, match=r"names.txt has a number on every line, and .* on the first: sort the lines by it"
    ):
        names_of(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        "1 euro\n2 euro\n",
        "Airbus 320\nBoeing 747\n",
        "0 cat\ndog\n",
        "7up\n3-toed sloth\n",
        "0\n1\n",
        "2 cats\n",
        "01 a\n02 b\n",
    ],
)
def test_numbers_may_belong_to_names(tmp_path, text):
    assert names_of(tmp_path, text) == (tuple(text.splitlines()), [])


def test_labels_of_a_csv_may_be_lines_of_a_numbered_list(tmp_path):
    """Or names, or positions."""
    files(tmp_path, *(f"{number}.jpg" for number in range(4)))
    (tmp_path / "c.txt").write_text("0 cat\n1 dog\n")
    (tmp_path / "t.csv").write_text("path,label\n0.jpg,0 cat\n1.jpg,1 dog\n2.jpg,cat\n3.jpg,1\n")
    card = card_of_options({"source": "csv", "root": str(tmp_path), "train": "t.csv", "classes": "c.txt"})
    source = read_source(card, tmp_path)
    assert (source.classes, source.splits["train"].labels.tolist()) == (("cat", "dog"), [0, 1, 0, 1])


def shards(root, **keys):
    """A card of a tar that calls label 0 cat and label 1 dog."""
    about = [json.dumps({"label": label, "class": name}).encode() for label, name in enumerate(("cat", "dog"))]
    tar(root / "a.tar", *(each for n in range(2) for each in ((f"{n}.jpg", JPG), (f"{n}.json", about[n]))))
    card = {"source": "webdataset", "name": "n", "license": "n", "splits": {"train": {"tars": "a.tar"}}}
    return make_card(card | keys, "card")


def test_a_list_may_not_swap_the_names_in_tars(tmp_path):
    """Names that the tars have not are taken."""
    (tmp_path / "c.txt").write_text("dog\ncat\n")
    for classes, place in (("c.txt", r"c.txt"), (["dog", "eel"], "the card's list of classes")):
        with pytest.raises(
            DataError, match=f"{place} calls label 0 'dog', which is label 1 in the tars: give the names"
        ):
            read_source(shards(tmp_path, classes=classes), tmp_path)
    for names in (["cat", "dog"], ["Felis catus", "Canis lupus"], ["Felis catus", "dog"]):
        assert read_source(shards(tmp_path, classes=names), tmp_path).classes == tuple(names)


def test_a_list_may_not_swap_the_names_of_categories(tmp_path):
    """Of a JSON file and of torchvision's folders; iNaturalist 2018 calls its categories by their numbers."""
    files(tmp_path, "1.jpg", "2.jpg", "in/00003_moth/1.jpg", "in/00007_newt/1.jpg")
    page = {
        "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
        "annotations": [{"image_id": 1, "category_id": 3}, {"image_id": 2, "category_id": 7}],
    }
    (tmp_path / "c.json").write_text('[{"id": 3, "name": "newt"}, {"id": 7, "name": "moth"}]')
    keys = {"source": "inaturalist", "name": "n", "license": "n", "categories": "c.json"}
    json_card = make_card(keys | {"splits": {"train": {"annotations": "t.json"}}}, "card")
    folders = changed(json_card, splits={"train": {"folder": "in"}})
    for names in ({3: "moth", 7: "newt"}, {3: "3", 7: "7"}):
        page["categories"] = [{"id": number, "name": name} for number, name in names.items()]
        (tmp_path / "t.json").write_text(json.dumps(page))
        if names[3] == "3":
            assert read_source(json_card, tmp_path).classes == ("newt", "moth")
            continue
        for card in (json_card, folders):
            with pytest.raises(DataError, match=r"c.json calls category 3 'newt', which is category 7 in .*: give the"):
                read_source(card, tmp_path)

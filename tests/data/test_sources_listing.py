"""List and CSV files as they are published and as people write them."""

import json
import tracemalloc
import unicodedata
from pathlib import Path
from typing import Any, Literal

import pytest

from paco_ds.data.pack.card import Card, make_card
from paco_ds.data.pack.read import class_counts, list_source, read_source
from paco_ds.data.pack.source import Source
from paco_ds.errors import DataError
from tests.data.tiny import encoded


def card(source: str, splits: dict[str, Any], **settings: Any) -> Card:
    """A card of such a source."""
    return make_card({"source": source, "name": "n", "license": "n", "splits": splits, **settings}, "card")


def listed(root: Path, text: str, **settings: Any) -> Source:
    """The source of one list file, train.txt."""
    (root / "train.txt").write_text(text, encoding="utf-8")
    return list_source(card("list", {"train": {"list": "train.txt"}}, **settings), root)


def tabled(root: Path, text: str | bytes, **settings: Any) -> Source:
    """The source of one CSV file, train.csv."""
    (root / "train.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return list_source(card("csv", {"train": {"file": "train.csv"}}, **settings), root)


def test_list_files_are_read_as_published(tmp_path: Path) -> None:
    """ImageNet-LT's and Places-LT's lines; names may have spaces and letters of any script; empty lines are none."""
    lines = (
        "train/n01440764/n01440764_190.JPEG 0\nb/bäckerei/im age.jpg 1\n\ntrain_val2018/Aves/3111/a.jpg\t1\n"
        "dog d/img.jpg\t1\n"
    )
    source = listed(tmp_path, lines)
    train = source.splits["train"]
    assert list(train.names) == [
        "train/n01440764/n01440764_190.JPEG",
        "b/bäckerei/im age.jpg",
        "train_val2018/Aves/3111/a.jpg",
        "dog d/img.jpg",
    ]
    assert train.labels.tolist() == [0, 1, 1, 1]
    assert source.classes == ("0", "1")


def test_class_names_come_from_the_card_or_a_file(tmp_path: Path) -> None:
    """One name on each line; a byte order mark, as Windows writes it, is none of the first."""
    (tmp_path / "names.txt").write_text("\ufeffant\nbee\n", encoding="utf-8")
    assert listed(tmp_path, "a.jpg 1\nb.jpg 0\n", classes="names.txt").classes == ("ant", "bee")
    assert listed(tmp_path, "a.jpg 1\nb.jpg 0\n", classes=["x", "y"]).classes == ("x", "y")


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("a.jpg 0\nb.jpg two\n", {}, r"train.txt, line 2: 'b.jpg two' is not a path and a label from 0"),
        ("a.jpg -1\n", {}, "line 1: .* is not a path and a label"),
        ("a.jpg\n", {}, "line 1: .* is not a path and a label"),
        ("a.jpg 2\n", {"classes": ["x", "y"]}, "line 1: label 2 is out of range, the labels are 0 to 1"),
        ("a.jpg 99999999999\n", {}, "label 99999999999 is out of range"),
        ("../a.jpg 0\n", {}, "image ../a.jpg does not lie under the root"),
        ("/etc/a.jpg 0\n", {}, "does not lie under the root"),
        ("\n", {}, "train.txt names no image"),
        ("a.jpg 0\n", {"classes": "gone.txt"}, "the file of class names .*gone.txt is missing"),
    ],
)
def test_mistakes_in_lists_are_named(tmp_path: Path, text: str, settings: dict[str, Any], message: str) -> None:
    """Each with file, line and what is right there."""
    with pytest.raises(DataError, match=message):
        listed(tmp_path, text, **settings)


@pytest.mark.parametrize(
    ("names", "message"), [("ant\nant\n", "names ant more than once"), ("ant\n\nbee\n", "empty line")]
)
def test_mistakes_in_class_names_are_named(tmp_path: Path, names: str, message: str) -> None:
    """A repeated or an empty name would shift the labels of all that follow."""
    (tmp_path / "names.txt").write_text(names)
    with pytest.raises(DataError, match=message):
        listed(tmp_path, "a.jpg 0\n", classes="names.txt")


def test_class_without_image_is_named(tmp_path: Path) -> None:
    """A gap in the labels is a class that cannot be learnt."""
    (tmp_path / "train.txt").write_text("a.jpg 0\nb.jpg 2\n")
    with pytest.raises(DataError, match="no training image of 1"):
        read_source(card("list", {"train": {"list": "train.txt"}}), tmp_path)


def test_csv_columns_are_found_by_name(tmp_path: Path) -> None:
    """Labels are class names, sorted; quotes, other columns, another delimiter and a byte order mark are no trouble."""
    text = '\ufeffsku;image;kind\n1;"a;b.jpg";shoe\n2;ü.jpg;hat\n3;c.jpg;shoe\n'
    source = tabled(tmp_path, text, path_column="image", label_column="kind", delimiter=";")
    assert source.classes == ("hat", "shoe")
    assert list(source.splits["train"].names) == ["a;b.jpg", "ü.jpg", "c.jpg"]
    assert source.splits["train"].labels.tolist() == [1, 0, 1]


def test_a_tab_may_be_written_as_shells_pass_it_on(tmp_path: Path) -> None:
    """`--delimiter '\\t'` is two characters."""
    assert tabled(tmp_path, "path\tlabel\na.jpg\tx\n", delimiter="\\t").classes == ("x",)


def test_csv_numbers_are_sorted_as_numbers_or_index_the_classes(tmp_path: Path) -> None:
    """Class 10 after class 9; with classes given a label may be a position in them."""
    text = "path,label\na.jpg,10\nb.jpg,9\n"
    assert tabled(tmp_path, text).classes == ("9", "10")
    source = tabled(tmp_path, "path,label\na.jpg,1\nb.jpg,ant\n", classes=["ant", "bee"])
    assert source.splits["train"].labels.tolist() == [1, 0]


def test_groups_are_kept(tmp_path: Path) -> None:
    """Rows of one product share a number, whatever spaces and form of Unicode its name is written with."""
    source = tabled(tmp_path, "path,label,sku\na,x,é\nb,x,8\nc,x, e\u0301 \n", group_column="sku")
    assert source.splits["train"].groups.tolist() == [0, 1, 0]


def test_other_splits_have_the_classes_of_train(tmp_path: Path) -> None:
    """A class that only val has is named with its line, whatever the order of the splits."""
    (tmp_path / "train.csv").write_text("path,label\na.jpg,x\n")
    (tmp_path / "val.csv").write_text("path,label\nb.jpg,x\nc.jpg,y\n")
    two = card("csv", {"val": {"file": "val.csv"}, "train": {"file": "train.csv"}})
    with pytest.raises(DataError, match=r"val.csv, line 3: 'y' is none of the classes of train"):
        list_source(two, tmp_path)


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("file,label\na,x\n", {}, "has not the column 'path'; set path_column to one of: file, label"),
        ("path,path,label\na,b,x\n", {}, "has twice the column 'path'"),
        ("path,label\na,x,y\n", {}, "line 2 has 3 fields, the header has 2"),
        ("path,label\na,\n", {}, "line 2: label is empty"),
        ("path,label\n,x\n", {}, "line 2: path is empty"),
        ("path,label,sku\na,x,7\nb,x, \n", {"group_column": "sku"}, "line 3: sku is empty: give a row .* of its own"),
        ('path,label\n"a,x\n', {}, "no CSV"),
        ("path,label\n", {}, "names no image"),
        ("", {}, "has not the column"),
        ("path;label\na;x\n", {}, "one column, 'path;label'; its fields are separated by ';': set delimiter"),
        ("path\tlabel\na\tx\n", {}, "separated by .*: set delimiter"),
        ("path,label\na," + "9" * 5000 + "\n", {"classes": ["x"]}, "label 99999999999999999999 is out of range"),
        ("path,label\na,7\n", {"classes": ["x", "y"]}, "label 7 is out of range, the labels are 0 to 1"),
        ("path,label\na,z\n", {"classes": ["x", "y"]}, "'z' is none of the classes given"),
        ("path,label\na,1\nb,0\n", {"classes": ["1", "2"]}, "line 3: '0' is none of the classes given; .* write names"),
        (b"path,label\n\xff\xfe,x\n", {}, "is not UTF-8 text"),
    ],
)
def test_mistakes_in_csv_are_named(tmp_path: Path, text: str | bytes, settings: dict[str, Any], message: str) -> None:
    """Each with file and line."""
    with pytest.raises(DataError, match=message):
        tabled(tmp_path, text, **settings)


def test_missing_empty_and_repeated_images_are_counted(tmp_path: Path) -> None:
    """The image that is there stays; a name with a zero byte is no file."""
    (tmp_path / "a.jpg").write_bytes(encoded())
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "folder.jpg").mkdir()
    source = tabled(tmp_path, "path,label\na.jpg,x\ngone.jpg,x\nempty.jpg,x\na.jpg,x\nfolder.jpg,x\nn\0l,x\n").checked()
    assert sorted(map(str, source.bad)) == [
        "a.jpg: listed_twice",
        "empty.jpg: empty",
        "folder.jpg: missing",
        "gone.jpg: missing",
        "n\\x00l: missing",
    ]
    assert list(source.splits["train"].names) == ["a.jpg"]


def test_an_image_of_two_classes_is_bad_in_both(tmp_path: Path) -> None:
    """Neither row is to be trusted."""
    for name in "ab":
        (tmp_path / f"{name}.jpg").write_bytes(encoded())
    source = tabled(tmp_path, "path,label\na.jpg,x\nb.jpg,x\n./a.jpg,y\nb.jpg,x\nb.jpg,x\n").checked()
    assert list(map(str, source.bad)) == [*["a.jpg: two_labels"] * 2, *["b.jpg: listed_twice"] * 2]
    assert list(source.splits["train"].names) == ["b.jpg"]


@pytest.mark.parametrize(
    ("labels", "notes"),
    [
        (["owl", "great owl", "3", "30", "03a"], []),
        (["Cat", "cat", "b"], ["'Cat' and 'cat'"]),
        (["03", "3", "3.0", "30"], ["'03' and '3' and '3.0'"]),
        (["rock dove", "rock_dove", "rock-dove "], ["'rock dove' and 'rock-dove' and 'rock_dove'"]),
        (["a\u200bb", "ab"], ["'ab' and 'a\\u200bb'"]),
        (["a", "NaN"], ["missing value: 'NaN'"]),
        (["None", "none"], ["'None' and 'none'", "missing value: 'None', 'none'"]),
    ],
)
def test_class_names_that_may_be_mistakes_are_said(tmp_path: Path, labels: list[str], notes: list[str]) -> None:
    """They count as they are written."""
    text = "path,label\n" + "".join(f"{number}.jpg,{label}\n" for number, label in enumerate(labels))
    for number in range(len(labels)):
        (tmp_path / f"{number}.jpg").write_bytes(encoded())
    source = tabled(tmp_path, text).checked()
    assert len(source.classes) == len(labels)
    assert len(source.notes) == len(notes)
    assert all(expected in note for expected, note in zip(notes, source.notes, strict=True))


def test_counts_need_no_images(tmp_path: Path) -> None:
    """The list alone says how many images each class has."""
    (tmp_path / "train.txt").write_text("a.jpg 0\nb.jpg 1\nc.jpg 1\n")
    assert class_counts(card("list", {"train": {"list": "train.txt"}}), tmp_path, "train") == (("0", "1"), (1, 2))


def test_rows_cost_bytes_not_objects(tmp_path: Path) -> None:
    """100,000 rows of 40 bytes: the table and its making stay below 200 bytes a row."""
    with (tmp_path / "train.csv").open("w") as file:
        file.write("path,label\n")
        file.writelines(f"products/{i % 1000:04d}/{i:012d}-front.jpg,class {i % 500}\n" for i in range(100_000))
    tracemalloc.start()
    list_source(card("csv", {"train": {"file": "train.csv"}}), tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak / 100_000 < 200


@pytest.mark.parametrize("kind", ["list", "csv", "inaturalist"])
@pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
def test_names_of_another_unicode_form_are_the_files_on_disk(
    tmp_path: Path, kind: str, on_disk: Literal["NFC", "NFD"]
) -> None:
    """In folders too, and it is said. A file that both forms of a list name is listed twice."""
    folder = tmp_path / unicodedata.normalize(on_disk, "bäckerei")
    folder.mkdir()
    (folder / unicodedata.normalize(on_disk, "café.jpg")).write_bytes(encoded())
    names = [unicodedata.normalize(form, "bäckerei/café.jpg") for form in ("NFC", "NFD")]
    if kind == "list":
        source = listed(tmp_path, "".join(f"{name} 0\n" for name in names))
    elif kind == "csv":
        source = tabled(tmp_path, "path,label\n" + "".join(f"{name},x\n" for name in names))
    else:
        page = {
            "images": [{"id": number, "file_name": name} for number, name in enumerate(names)],
            "annotations": [{"image_id": number, "category_id": 5} for number in range(2)],
            "categories": [{"id": 5, "name": "x"}],
        }
        (tmp_path / "train.json").write_text(json.dumps(page))
        source = list_source(card("inaturalist", {"train": {"annotations": "train.json"}}), tmp_path)
    source = source.checked()
    train = source.splits["train"]
    assert (tmp_path / train.names[0]).stat().st_size == train.sizes[0]
    assert len(train) == 1
    assert [bad.reason for bad in source.bad] == ["listed_twice"]
    assert "1 names have another Unicode form on disk" in source.notes[0]


def test_a_name_of_several_files_is_told_and_not_guessed(tmp_path: Path) -> None:
    """Of both forms one is what the list says; a third form could be either."""
    forms = ["\u1ec7.jpg", "\u1eb9\u0302.jpg", "e\u0323\u0302.jpg"]
    for form in forms[:2]:
        (tmp_path / form).write_bytes(encoded())
    source = tabled(tmp_path, f"path,label\n{forms[0]},x\n{forms[2]},x\n").checked()
    assert list(source.splits["train"].names) == forms[:1]
    assert [bad.reason for bad in source.bad] == ["several_files_of_this_name"]

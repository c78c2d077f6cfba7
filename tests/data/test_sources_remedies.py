"""Messages about damaged lists, CSV files, JSON and tars: each names the fault and what to do."""

import gzip
import json

import pytest

from paco_ds.data.pack.card import card_of_options
from paco_ds.data.pack.command import main
from paco_ds.data.pack.read import read_source
from paco_ds.errors import DataError
from tests.data.test_sources_folder import files
from tests.data.test_sources_tars import JPG, tar
from tests.data.test_sources_tars import listed as tars_listed

PAGE = {
    "images": [{"id": 7, "file_name": "é.jpg"}],
    "annotations": [{"image_id": 7, "category_id": 1}],
    "categories": [{"id": 1, "name": "x"}],
}


def listed(root, source, name, content, **options):
    """The source of one file of train that holds `content`, beside a.jpg, b.jpg and é.jpg."""
    files(root, "a.jpg", "b.jpg", "é.jpg")
    (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_source(card_of_options({"source": source, "root": str(root), "train": name, **options}), root)


@pytest.mark.parametrize(
    ("source", "content", "options", "message"),
    [
        ("list", "a.jpg 1\nb.jpg 2\n", {}, "the labels of .*/t.txt count from 1, and here from 0: subtract 1"),
        (
            "list",
            "in/a.jpg 0\nin/b.jpg 1\n",
            {},
            "none of the 2 images .* is there, such as in/a.jpg: give as --root",
        ),
        ("csv", "sep=;\r\npath;label\r\na.jpg;x\r\n", {}, "separated by ';', as its first line says: set delimiter"),
        ("csv", 'path,label\na.jpg,"x\nb.jpg,y"\n', {}, r"line 3: label 'x\\nb.jpg,y' has a line end in it: close"),
        ("csv", 'path,label\n"a.jpg,x\nb.jpg",y\n', {}, r"line 3: path 'a.jpg,x\\nb.jpg' has a line end in it"),
        ("csv", 'path,label,g\na.jpg,x,"1\nb.jpg,y,2"\n', {"group_column": "g"}, "g .* has a line end in it"),
        ("csv", "sep=\npath,label\na.jpg,", {}, "line 3: label is empty"),
    ],
)
def test_mistakes_in_lists_and_csv_have_their_remedies(tmp_path, source, content, options, message):
    with pytest.raises(DataError, match=message):
        listed(tmp_path, source, "t.txt", content, **options)


def test_the_first_line_by_which_excel_tells_the_delimiter_is_none_of_the_table(tmp_path):
    """And a line end in a column that is not read is one of a text; one at the end of a field counts as space."""
    text = 'sep=;\r\npath;label;about\r\na.jpg;x;"two\nlines"\r\nb.jpg;"y\n";\r\n'
    assert listed(tmp_path, "csv", "t.csv", text, delimiter=";").classes == ("x", "y")


def test_groups_that_look_alike_are_said(tmp_path):
    """As classes are: a spreadsheet writes 12 as 12.0 in one file and not in the other."""
    text = "path,label,sku\na.jpg,x,12\nb.jpg,x,12.0\né.jpg,x,13\n"
    notes = listed(tmp_path, "csv", "t.csv", text, group_column="sku").notes
    assert notes == ["groups of sku that look alike, and count as different: '12' and '12.0'"]


def test_a_path_that_goes_back_over_a_link_is_the_file_of_the_system(tmp_path):
    """`link/../a.jpg` lies beside the target of the link; other paths are normalised."""
    root = files(tmp_path / "in", "c/1.jpg")
    files(tmp_path, "other/sub/1.jpg", "other/a.jpg")
    (root / "link").symlink_to("../other/sub")
    source = listed(root, "csv", "t.csv", "path,label\nlink/../a.jpg,x\nc/../a.jpg,y\nc/./../b.jpg,y\n")
    train = source.splits["train"]
    assert list(train.names) == ["link/../a.jpg", "a.jpg", "b.jpg"]
    assert bytes(source.images.read(train, 0, memoryview(bytearray(train.sizes[0] + 1)))) == b"other/a.jpg"


@pytest.mark.parametrize("name", ["t.json", "T.JSON"])
def test_json_is_known_by_its_ending_in_any_case(tmp_path, name):
    assert listed(tmp_path, "inaturalist", name, json.dumps(PAGE)).classes == ("x",)


TEXT = json.dumps(PAGE, ensure_ascii=False)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "t.json",
            TEXT.replace("7,", '"7",'),
            "images has the id '7', a text: write it as a whole number without quotes",
        ),
        ("t.json.gz", gzip.compress(TEXT.encode()), "t.json.gz is compressed by gzip: unpack it with gunzip"),
        ("t.json", TEXT.encode("utf-16"), "t.json is UTF-16 text: convert it with iconv -f UTF-16 -t UTF-8"),
        ("t.json", TEXT.encode("utf-16-le"), "is UTF-16 text"),
        ("t.json", TEXT.encode("latin-1"), "t.json is not UTF-8 text: convert it, as with iconv -f LATIN1 -t UTF-8"),
    ],
)
def test_json_that_is_written_otherwise_is_called_so(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        listed(tmp_path, "inaturalist", name, content)


def test_a_tar_of_hidden_members_alone_is_called_so(tmp_path):
    tar(tmp_path / "a.tar", ("home/me/.cache/0.jpg", JPG), ("home/me/.cache/0.cls", b"0"))
    with pytest.raises(
        DataError, match=r"all members of the tars of train are hidden, .*, the first home/me/.cache/0.jpg"
    ):
        tars_listed(tmp_path)


@pytest.mark.parametrize("name", ["b.tar", "more/b.tar.gz", "b.TGZ", "b.zip"])
def test_archives_in_a_tar_are_said(tmp_path, name):
    """Their images are not read."""
    tar(tmp_path / "a.tar", ("0.jpg", JPG), ("0.cls", b"\xef\xbb\xbf0"), (name, b"x"))
    (note,) = tars_listed(tmp_path).notes
    assert note.startswith(f"left out, archives in the tars of train, whose images are not read: a.tar#{name}; unpack")


@pytest.mark.parametrize("option", ["--train", "--root"])
def test_an_option_that_is_empty_is_refused(tmp_path, capsys, option):
    """Such as a variable of the shell that is not set; the root would be the folder of the command."""
    words = {"--source": "folder", "--root": str(tmp_path), "--output": str(tmp_path / "out"), option: ""}
    assert main(["build", *(word for pair in words.items() for word in pair)]) == 2
    assert f"{option} is empty, such as an unset variable" in " ".join(capsys.readouterr().err.split())

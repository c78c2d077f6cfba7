"""Tars of others are whole and say one thing, or are refused by what is wrong with them."""

import gzip
import io
import json
import lzma
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest

from paco_ds.data.pack.card import card_of_options
from paco_ds.data.pack.read import read_source
from paco_ds.data.pack.source import Source
from paco_ds.errors import DataError
from tests.data.tiny import encoded

Member = tuple[str, bytes]
JPG, PNG = encoded(), encoded(".png")


def tar(path: Path, *members: Member) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            about = tarfile.TarInfo(name)
            about.size = len(data)
            archive.addfile(about, io.BytesIO(data))
    return path


def listed(root: Path, pattern: str = "a.tar", **options: str) -> Source:
    return read_source(card_of_options({"source": "webdataset", "root": str(root), "train": pattern, **options}), root)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            [("0.jpg", JPG), ("0.seg.png", PNG), ("0.cls", b"0")],
            r"0 has several images, .jpg, .seg.png: .*image-ending",
        ),
        ([("0.left.jpg", JPG), ("0.right.jpg", JPG), ("0.cls", b"0")], r"several images, .left.jpg, .right.jpg"),
        (
            [("i.v1.0.jpg", JPG), ("i.v1.0.cls", b"0"), ("i.v1.1.jpg", JPG), ("i.v1.1.cls", b"0")],
            "several images, .v1.0.jpg, .v1.1.jpg: .*; a key ends at the first dot of a name",
        ),
        ([("i.v1.jpg", JPG), ("i.v1.cls", b"0")], "i has no label: no .json, no .cls; .*; a key ends at the first dot"),
        ([("0.jpg", JPG), ("0.cls", b"0"), ("0.jpg", JPG)], "has 0.jpg twice"),
        ([("0.jpg", JPG), ("0.JPG", JPG), ("0.cls", b"0")], "has 0.JPG twice"),
        ([("0.jpg", JPG), ("0.cls", b"0"), ("0.cls", b"1")], "has 0.cls twice"),
        (
            [("0.jpg", JPG), ("0.cls", b"0"), ("1.jpg", JPG), ("1.cls", b"0"), ("0.txt", b"x")],
            "members of 0 in two place",
        ),
        ([("0.jpg", JPG), ("1.jpg", JPG), ("0.cls", b"0"), ("1.cls", b"1")], r"0 has no label: .* \(tar --sort=name\)"),
        ([("0.jpg", JPG), ("0.cls", b"cat")], "0: .cls: 'cat' is no number from 0"),
        ([("0.jpg", JPG), ("0.cls", b"1.0")], "0: .cls: '1.0' is no number from 0"),
        ([("0.jpg", JPG), ("0.cls", b"9" * 5000)], "0: .cls: label 99999999999999999999 is out of range"),
        ([("0.jpg", JPG), ("0.cls", b"2000000000")], ".cls: label 2000000000 is out of range, .* 0 to 9999999"),
        ([("0.jpg", JPG), ("0.json", b'{"label": 2000000000}')], "label 2000000000 is no number from 0 to 9999999"),
        ([("0.jpg", JPG), ("0.json", b'{"label": 0, "label": 1}')], "is not JSON .the key 'label' stands in it twice"),
        ([("0.jpg", JPG), ("0.json", b'{"label": ' + b"9" * 5000 + b"}")], "is not JSON"),
        ([("0.jpg", JPG), ("0.json", b'{"label": 1}'), ("0.cls", b"0")], "label 1 by its .json, and 0 by its .cls"),
        ([("0.jpg", JPG), ("0.json", b"[1]"), ("0.cls", b"0")], r"its .json is no object with keys, but \[1\]"),
        ([("0.jpg", JPG), ("0.json", b'{"caption": "x"}')], r"its .json has no 'label' \(label_key\), no .cls"),
    ],
)
def test_what_is_not_one_thing_is_refused(tmp_path, members, message):
    """With tar, sample and remedy."""
    tar(tmp_path / "a.tar", *members)
    with pytest.raises(DataError, match=message):
        listed(tmp_path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (tarfile.LNKTYPE, "1.jpg is a link to 0.jpg, .*: pack it with tar --dereference --hard-dereference"),
        (tarfile.SYMTYPE, "1.jpg is a link to 0.jpg"),
        (tarfile.FIFOTYPE, "1.jpg is a folder, a device or the like"),
        (tarfile.GNUTYPE_SPARSE, "1.jpg is stored as a sparse file"),
    ],
)
def test_members_without_bytes_of_their_own_are_refused(tmp_path, kind, message):
    """GNU tar packs a second name of a file as a link; readers of webdataset skip it without a word."""
    tar(tmp_path / "a.tar", ("0.jpg", JPG), ("0.cls", b"0"))
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        about = tarfile.TarInfo("1.jpg")
        about.type, about.linkname = kind, "0.jpg"
        archive.addfile(about)
    with pytest.raises(DataError, match=message):
        listed(tmp_path)


def test_folders_and_links_beside_the_samples_do_not_matter(tmp_path):
    tar(tmp_path / "a.tar", ("0.jpg", JPG), ("0.cls", b"0"))
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        for name, kind in (("more", tarfile.DIRTYPE), ("LICENSE", tarfile.SYMTYPE)):
            about = tarfile.TarInfo(name)
            about.type, about.linkname = kind, "x"
            archive.addfile(about)
    assert len(listed(tmp_path).splits["train"]) == 1


@pytest.mark.parametrize(("ending", "name"), [("jpg", "0.jpg"), (".seg.PNG", "0.seg.png")])
def test_one_of_several_images_is_chosen_by_its_ending(tmp_path, ending, name):
    """A sample without it has no image."""
    tar(tmp_path / "a.tar", ("0.cls", b"0"), ("0.jpg", JPG), ("0.seg.png", PNG), ("1.cls", b"0"), ("1.webp", b"w"))
    source = listed(tmp_path, image_ending=ending)
    assert list(source.splits["train"].names) == [f"a.tar#{name}"]
    assert [str(bad) for bad in source.bad] == ["a.tar#1: no_image"]


def test_cls_counts_where_the_json_has_no_label(tmp_path):
    """As img2dataset writes it; both may say the same."""
    about = json.dumps({"caption": "x", "class": "owl"}).encode()
    tar(
        tmp_path / "a.tar",
        *(("0.jpg", JPG), ("0.cls", b"0\n"), ("0.json", about)),
        *(("1.jpg", JPG), ("1.cls", b"1"), ("1.json", b'{"label": 1}')),
    )
    source = listed(tmp_path)
    assert source.classes == ("owl", "1")
    assert source.splits["train"].labels.tolist() == [0, 1]


def test_a_class_without_a_name_is_refused(tmp_path):
    """Before the build, whose manifest would be refused."""
    tar(tmp_path / "a.tar", ("0.jpg", JPG), ("0.json", b'{"label": 0, "class": ""}'))
    with pytest.raises(DataError, match=r"the class of label 0 of .* has an empty name: give it one"):
        listed(tmp_path)


@pytest.mark.parametrize("pattern", ["a-*.tar", "*-*.tar", "a-[0-1].tar", "a-{0..1}.tar", "a-?.tar"])
def test_patterns_name_tars_and_no_hidden_files(tmp_path, pattern):
    """macOS puts a ._ file beside each."""
    for number in range(2):
        tar(tmp_path / f"a-{number}.tar", ("0.jpg", JPG), ("0.cls", b"0"))
        (tmp_path / f"._a-{number}.tar").write_bytes(b"Mac OS X")
    assert list(listed(tmp_path, pattern).splits["train"].names) == ["a-0.tar#0.jpg", "a-1.tar#0.jpg"]


def test_a_pattern_with_half_a_brace_is_one_line(tmp_path):
    with pytest.raises(DataError, match=r"the pattern a-\{0..1.tar has half a pair of braces"):
        listed(tmp_path, "a-{0..1.tar")


def test_a_tar_of_two_splits_is_said_however_it_is_written(tmp_path):
    """`./a.tar` and `a.tar` are one."""
    tar(tmp_path / "a.tar", ("0.jpg", JPG), ("0.cls", b"0"))
    assert listed(tmp_path, val="./a.tar").notes == ["WARNING: 1 of 1 images of val are also in train: a.tar#0.jpg"]


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_tar_that_is_a_link_to_one_of_another_split_is_said(tmp_path, link):
    tar(tmp_path / "a.tar", ("0.jpg", JPG), ("0.cls", b"0"))
    link(tmp_path / "a.tar", tmp_path / "b.tar")
    assert listed(tmp_path, "a.tar", val="b.tar").notes == [
        "WARNING: 1 of 1 images of val are also in train: b.tar#0.jpg"
    ]


def test_a_number_sign_in_a_tars_path_is_part_of_it(tmp_path):
    """`a.tar#2.tar` was read as member `2.tar` of a.tar, whose images were packed in its place."""
    tar(tmp_path / "a.tar", ("0.jpg", b"another" + JPG), ("0.cls", b"0"))
    tar(tmp_path / "a.tar#2.tar", ("0#.jpg", JPG), ("0#.cls", b"0"))
    source = pickle.loads(pickle.dumps(listed(tmp_path, "a*.tar")))
    samples = source.splits["train"]
    assert list(samples.names) == ["a.tar#0.jpg", "a.tar#2.tar#0#.jpg"]
    assert bytes(source.images.read(samples, 1, memoryview(bytearray(len(JPG) + 1)))) == JPG


def test_hidden_members_are_left_out_aloud(tmp_path):
    """macOS puts a ._ file before each, and a .DS_Store between them."""
    members = [("./0.jpg", JPG), ("./.DS_Store", b"x"), ("./0.cls", b"0"), ("./__MACOSX/0.jpg", b"x")]
    tar(tmp_path / "a.tar", *(each for name, data in members for each in ((f"./._{name[2:]}", b"\0"), (name, data))))
    source = listed(tmp_path)
    assert list(source.splits["train"].names) == ["a.tar#./0.jpg"]
    assert source.notes == ["left out, hidden members of the tars of train (such as macOS's ._ files): 6"]


@pytest.mark.parametrize(
    ("pack", "message"),
    [
        (gzip.compress, "compressed by gzip, .*: unpack it with gunzip"),
        (lzma.compress, "compressed by xz"),
        (lambda raw: b"\x28\xb5\x2f\xfd" + raw, "compressed by zstd"),
        (lambda raw: b"BZh9" + raw, "compressed by bzip2"),
    ],
)
def test_a_packed_tar_is_called_so(tmp_path, pack, message):
    """And not damaged."""
    tar(tmp_path / "a.tar", ("0.jpg", JPG), ("0.cls", b"0"))
    (tmp_path / "a.tar").write_bytes(pack((tmp_path / "a.tar").read_bytes()))
    with pytest.raises(DataError, match=message):
        listed(tmp_path)


def test_a_zip_is_called_so(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.tar", "w") as archive:
        archive.writestr("0.jpg", JPG)
    with pytest.raises(DataError, match="is a zip archive"):
        listed(tmp_path)


@pytest.mark.parametrize("between", [0, 3_000_000])
def test_tars_joined_by_cat_are_refused(tmp_path, between):
    """All after the first would be lost; zeros after a tar are no fault, however many."""
    first = tar(tmp_path / "a.tar", ("0.jpg", JPG), ("0.cls", b"0")).read_bytes() + bytes(between)
    (tmp_path / "a.tar").write_bytes(first)
    assert len(listed(tmp_path).splits["train"]) == 1
    second = tar(tmp_path / "b.tar", ("1.jpg", JPG), ("1.cls", b"0")).read_bytes()
    (tmp_path / "a.tar").write_bytes(first + second)
    with pytest.raises(DataError, match=rf"a.tar goes on after its end, at byte {len(first)}: tars joined by `cat`"):
        listed(tmp_path)


def test_class_names_are_compared_in_nfc(tmp_path):
    members = [
        member
        for number, name in enumerate(("café", "cafe\u0301"))
        for member in ((f"{number}.jpg", JPG), (f"{number}.json", json.dumps({"label": 0, "class": name}).encode()))
    ]
    tar(tmp_path / "a.tar", *members)
    assert listed(tmp_path).classes == ("café",)

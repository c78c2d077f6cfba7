"""Pictures in two splits: the same files are found when they are listed, the same pictures by `check --duplicates`."""

import io
import os
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import BmpImagePlugin, EpsImagePlugin, ExifTags, Image

from paco_ds.data.manifest import load_manifest
from paco_ds.data.pack.build_plan import select
from paco_ds.data.pack.card import card_of_options, folder_card
from paco_ds.data.pack.command import main
from paco_ds.data.pack.duplicates import _near, find_duplicates, picture_hash
from paco_ds.data.pack.read import read_source
from paco_ds.data.pack.shards import build_shards


def picture(seed: int, size: int = 64) -> np.ndarray:
    """Blurred noise: as a photograph, most of it is in low frequencies."""
    noise = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), size / 10), None, 0, 255, cv2.NORM_MINMAX)


def save(path: Path, image: np.ndarray, quality: int = 95) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_QUALITY, quality])


def test_the_same_path_in_two_lists_is_said(tmp_path):
    """However it is written; with how many, of how many, and which."""
    for number in range(4):
        save(tmp_path / f"i/{number}.jpg", picture(number, 8))
    (tmp_path / "train.txt").write_text("i/0.jpg 0\ni/1.jpg 0\ni/2.jpg 0\n")
    (tmp_path / "val.txt").write_text("./i/2.jpg 0\ni/3.jpg 0\n")
    (tmp_path / "test.txt").write_text("i//0.jpg 0\ni/2.jpg 0\n")
    pages = {split: f"{split}.txt" for split in ("train", "val", "test")}
    source = read_source(card_of_options({"source": "list", "root": str(tmp_path), **pages}), tmp_path)
    assert source.notes == [
        "WARNING: 1 of 2 images of val are also in train: i/2.jpg",
        "WARNING: 2 of 2 images of test are also in train: i/0.jpg, i/2.jpg",
        "WARNING: 1 of 2 images of test are also in val: i/2.jpg",
    ]


def test_a_group_in_two_splits_is_said(tmp_path):
    """Other images of a product that train has are no independent test."""
    for number in range(4):
        save(tmp_path / f"{number}.jpg", picture(number, 8))
    (tmp_path / "train.csv").write_text("path,label,sku\n0.jpg,a,s1\n1.jpg,a,s2\n")
    (tmp_path / "val.csv").write_text("path,label,sku\n2.jpg,a,s2 \n3.jpg,a,s3\n")
    pages = {split: f"{split}.csv" for split in ("train", "val")}
    options = {"source": "csv", "root": str(tmp_path), "group_column": "sku", **pages}
    source = read_source(card_of_options(options), tmp_path)
    assert source.notes == ["WARNING: 1 of 2 images of val are of groups of train: 2.jpg"]


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_to_an_image_of_another_split_is_said(tmp_path, link):
    """Symbolic or hard; files that are merely of one size and time are not."""
    for split, number in (("train", 0), ("val", 1)):
        save(tmp_path / split / "a" / f"{number}.jpg", picture(0, 8))
        os.utime(tmp_path / split / "a" / f"{number}.jpg", ns=(5, 5))
    assert read_source(folder_card(tmp_path), tmp_path).notes == []
    link(tmp_path / "train/a/0.jpg", tmp_path / "val/a/2.jpg")
    notes = read_source(folder_card(tmp_path), tmp_path).notes
    assert notes == ["WARNING: 1 of 2 images of val are also in train: val/a/2.jpg"]


def test_links_within_train_that_a_share_divides_are_said(tmp_path):
    """Two names of one image may be drawn into both splits."""
    for number in range(4):
        save(tmp_path / "train" / "a" / f"{number}.jpg", picture(number, 8))
        os.link(tmp_path / f"train/a/{number}.jpg", tmp_path / f"train/a/copy{number}.jpg")
    card = folder_card(tmp_path).model_copy(update={"validation_share": 0.4})
    (note,) = select(card, read_source(card, tmp_path), seed=0).notes
    assert "of 3 images of val are also in train: train/a/" in note


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Train of two classes; val with a copy, a copy of less quality, a smaller one, one of its own and a white one."""
    root = tmp_path_factory.mktemp("pictures")
    for number in range(6):
        save(root / f"train/{'ab'[number % 2]}/{number}.jpg", picture(number))
    save(root / "train/a/white.jpg", np.full((64, 64, 3), 255, np.uint8))
    save(root / "train/b/again.jpg", picture(4))  # of class a
    save(root / "val/a/copy.jpg", picture(0))
    save(root / "val/b/worse.jpg", picture(1), quality=60)
    save(root / "val/a/smaller.jpg", cv2.resize(picture(2), (48, 48), interpolation=cv2.INTER_AREA))
    save(root / "val/b/own.jpg", picture(99))
    save(root / "val/b/white.jpg", np.full((60, 60, 3), 255, np.uint8))
    output = tmp_path_factory.mktemp("shards")
    build_shards(folder_card(root), root, output)
    return output


@pytest.mark.parametrize("workers", [1, 2])
def test_pictures_in_two_splits_are_named(shards, capsys, workers):
    """By bytes and by look, with the class if it is another; status 1. A picture of one colour is like no other."""
    assert main(["check", str(shards), "--duplicates", "--workers", str(workers)]) == 1
    said = capsys.readouterr().out
    assert "1 of 8 pictures of train are again in train, the same, 1 of them in another class: " in said
    assert "1 of 5 pictures of val are also in train, the same: train/a/0.jpg = val/a/copy.jpg" in said
    assert "2 of 5 pictures of val are also in train, nearly the same: " in said
    assert "train/b/1.jpg = val/b/worse.jpg" in said
    assert "train/a/2.jpg = val/a/smaller.jpg" in said
    assert "own.jpg" not in said
    assert "white.jpg" not in said


def test_shards_without_them_are_said_to_be_so(tiny_shards, capsys):
    """Noise of 8 x 8 pixels is like nothing else."""
    assert main(["check", str(tiny_shards.directory), "--duplicates", "--workers", "1"]) == 0
    assert "no picture twice" in capsys.readouterr().out


def test_a_missing_package_is_named(shards, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "imagehash", None)
    assert main(["check", str(shards), "--duplicates", "--workers", "1"]) == 2
    assert "pip install 'paco_ds[duplicates]'" in capsys.readouterr().err


def test_what_is_no_picture_is_like_nothing():
    assert picture_hash(b"no image") == 0


def test_only_decoders_of_the_list_open_what_is_compared(monkeypatch):
    """Not Ghostscript, which Pillow calls for EPS; nor any decoder, for what costs more than training allows."""
    opened = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: opened.append("gs"))
    assert picture_hash(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n%%EOF\n") == 0
    bmp = io.BytesIO()
    Image.fromarray(picture(0, 64)[..., 0]).save(bmp, "BMP")
    slow = bytearray(bmp.getvalue())
    slow[18:26], slow[30] = struct.pack("<II", 2100, 2100), 1  # run-length: Pillow decodes it in Python
    monkeypatch.setattr(BmpImagePlugin.BmpRleDecoder, "decode", lambda *a: opened.append("rle") or (-1, 0))
    assert picture_hash(bytes(slow)) == 0
    assert opened == []


def test_near_rows_are_those_of_all_pairs():
    """Against each hash with each; the first of train counts."""
    rng = np.random.default_rng(0)
    a = rng.integers(1, 2**63, 300, dtype=np.uint64)
    flips = [sum(1 << int(bit) for bit in rng.choice(64, number % 7, replace=False)) for number in range(200)]
    b = a[rng.integers(0, 300, 200)] ^ np.array(flips, np.uint64)
    a[7], b[3] = 0, 0
    a[250] = a[5]
    for x, y, before in ((a, b, False), (a, a, True)):
        close = np.bitwise_count(x[:, None] ^ y) <= 4
        close &= (x != 0)[:, None] & (y != 0)
        if before:
            close &= np.arange(len(x))[:, None] < np.arange(len(y))
        expected = [[int(close[:, row].argmax()), row] for row in range(len(y)) if close[:, row].any()]
        assert _near(x, y, strictly_before=before).tolist() == expected
        assert expected


def test_pairs_say_their_splits(shards):
    names = [(pairs.first, pairs.second) for pairs in find_duplicates(load_manifest(shards))]
    assert names == [("train", "train"), ("val", "val"), ("train", "val")]


def test_a_photograph_turned_by_exif_or_with_16_bits_is_near_to_itself():
    """Stored as the camera wrote it, and upright; as 8 bits and as 16."""
    image = Image.fromarray(picture(3, 256)[:200])
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned, stored, gray, deep = (io.BytesIO() for _ in range(4))
    image.save(turned, "JPEG", exif=exif)
    image.transpose(Image.Transpose.ROTATE_270).save(stored, "JPEG")
    image.convert("L").save(gray, "PNG")
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(deep, "PNG")
    for one, other in ((turned, stored), (gray, deep)):
        hashes = [picture_hash(file.getvalue()) for file in (one, other)]
        assert 0 not in hashes
        assert (hashes[0] ^ hashes[1]).bit_count() <= 4

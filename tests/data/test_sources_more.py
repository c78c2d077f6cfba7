"""CIFAR's pickles, torchvision's INaturalist folders, tars packed again, and sources behind a URL."""

import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import fsspec
import numpy as np
import pytest
import webdataset as wds

from paco_ds.data.manifest import Manifest
from paco_ds.data.pack.build_plan import BuildOptions
from paco_ds.data.pack.card import Card, card_of_options, changed, folder_card, make_card
from paco_ds.data.pack.read import read_source
from paco_ds.data.pack.shards import build_shards
from paco_ds.data.pack.source import Source
from paco_ds.data.shard import ShardReader
from paco_ds.errors import DataError
from tests.data.tiny import encoded, flip_byte


def card(source: str, splits: dict[str, Any], **settings: Any) -> Card:
    """A card of such a source."""
    return make_card({"source": source, "name": "n", "license": "n", "splits": splits, **settings}, "card")


def read_all(source: Source, split: str = "train") -> list[bytes]:
    """The bytes of all images of a split."""
    samples = source.splits[split]
    rooms = [memoryview(bytearray(size + 1)) for size in samples.sizes.tolist()]
    return [bytes(source.images.read(samples, row, room)) for row, room in enumerate(rooms)]


PIXELS = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)


def cifar100(root: Path, **changes: Any) -> Path:
    """CIFAR-100's folder with 4 images a split, as python 2 and numpy wrote it: keys are bytes."""
    page = {b"data": PIXELS.reshape(4, -1), b"fine_labels": [1, 0, 1, 0], b"coarse_labels": [0] * 4} | {
        key.encode(): value for key, value in changes.items()
    }
    for name in ("train", "test"):
        (root / name).write_bytes(pickle.dumps(page, protocol=2))
    (root / "meta").write_bytes(pickle.dumps({b"fine_label_names": [b"apple", b"bear"]}, protocol=2))
    return root


def test_cifar_100_is_found_and_stored_without_loss(tmp_path: Path) -> None:
    """The folder is enough; pixels come back as they were, red first."""
    made = card_of_options({"source": "cifar", "root": str(cifar100(tmp_path))})
    source = read_source(made, tmp_path)
    assert source.classes == ("apple", "bear")
    assert source.splits["train"].labels.tolist() == [1, 0, 1, 0]
    for data, pixels in zip(read_all(source), PIXELS, strict=True):
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        assert decoded is not None
        assert (decoded[..., ::-1] == pixels.transpose(1, 2, 0)).all()


def test_cifar_10_batches_are_laid_end_to_end(tmp_path: Path) -> None:
    """Five files are one split; keys may be text."""
    for number in range(1, 6):
        page = {"data": PIXELS.reshape(4, -1), "labels": [number % 2] * 4}
        (tmp_path / f"data_batch_{number}").write_bytes(pickle.dumps(page))
    (tmp_path / "test_batch").write_bytes(pickle.dumps({"data": PIXELS.reshape(4, -1), "labels": [0, 1, 0, 1]}))
    (tmp_path / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat", "dog"]}))
    source = read_source(card_of_options({"source": "cifar", "root": str(tmp_path)}), tmp_path)
    assert source.splits["train"].labels.tolist() == [1] * 4 + [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4
    assert source.splits["train"].names[4] == "data_batch_2#0"


class Evil:
    """Runs a command when unpickled the usual way."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch /tmp/paco_ds_must_not_exist",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({b"data": Evil()}), "asks for posix.system, which CIFAR's files have no use for"),
        (pickle.dumps({b"data": np.zeros(2, object), b"fine_labels": [0]}), "no data of uint8"),
        (pickle.dumps([1]), "holds a list, not a dict"),
        (pickle.dumps({b"data": PIXELS.reshape(4, -1), b"fine_labels": [0, 1]})[:-200], "no CIFAR pickle"),
        (pickle.dumps({b"data": PIXELS.reshape(4, -1), b"fine_labels": [0, 1]}), "has 4 images and 2 labels"),
        (pickle.dumps({b"data": PIXELS.reshape(4, -1), b"fine_labels": [0, 1, 2, 0]}), "label 2 of image 2 is none of"),
        (pickle.dumps({b"data": PIXELS.reshape(4, -1)}), "has neither fine_labels nor labels"),
        (pickle.dumps({b"data": PIXELS, b"fine_labels": [0] * 4}), r"no data of uint8 \[N, 3072\]"),
        (b"", "no CIFAR pickle"),
    ],
    ids=["command", "objects", "list", "cut", "few_labels", "label_range", "no_labels", "shape", "empty"],
)
def test_pickles_that_are_no_cifar_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    """Nothing in them is run; the file is named."""
    (cifar100(tmp_path) / "train").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_source(card_of_options({"source": "cifar", "root": str(tmp_path)}), tmp_path)
    assert not Path("/tmp/paco_ds_must_not_exist").exists()


def put(root: Path, *files: str) -> None:
    """Files that hold their own name."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(file.encode())


def test_torchvision_folders_of_2021(tmp_path: Path) -> None:
    """The number leads the label, the rest is the name; splits share categories."""
    put(tmp_path, "2021_train/00010_Aves_Pica/a.jpg", "2021_train/00002_Aves_Corvus/b.jpg")
    put(tmp_path, "2021_valid/00010_Aves_Pica/c.jpg", "2021_valid/00002_Aves_Corvus/d.jpg")
    splits = {"train": {"folder": "2021_train"}, "test": {"folder": "2021_valid"}}
    source = read_source(card("inaturalist", splits), tmp_path)
    assert source.classes == ("Aves_Corvus", "Aves_Pica")
    assert list(source.splits["test"].names) == [
        "2021_valid/00002_Aves_Corvus/d.jpg",
        "2021_valid/00010_Aves_Pica/c.jpg",
    ]
    assert source.splits["test"].labels.tolist() == [0, 1]


def test_torchvision_folders_of_2018(tmp_path: Path) -> None:
    """Super-category and category number; names may come from categories.json."""
    put(tmp_path, "2018/Aves/10/a.jpg", "2018/Plantae/2/b.jpg")
    splits = {"train": {"folder": "2018"}}
    assert read_source(card("inaturalist", splits), tmp_path).classes == ("Plantae/2", "Aves/10")
    (tmp_path / "categories.json").write_text('[{"id": 2, "name": "Rosa"}, {"id": 10, "name": "Pica"}]')
    named = read_source(card("inaturalist", splits, categories="categories.json"), tmp_path)
    assert named.classes == ("Rosa", "Pica")
    put(tmp_path, "2018/Aves/new/c.jpg")
    with pytest.raises(DataError, match=r"2018/Aves/new is no category"):
        read_source(card("inaturalist", splits), tmp_path)


def test_torchvision_folders_of_two_splits_must_name_a_category_alike(tmp_path: Path) -> None:
    """The label follows the number, so another name is another class."""
    put(tmp_path, "train/00001_Aves/a.jpg", "train/00002_Rosa/b.jpg", "val/00001_Rosa/c.jpg")
    splits = {name: {"folder": name} for name in ("train", "val")}
    with pytest.raises(DataError, match="category 1 is 'Aves' in split train and 'Rosa' in split val: number"):
        read_source(card("inaturalist", splits), tmp_path)


@pytest.mark.parametrize(
    "names", [("in/0000_x/a.jpg", "in/00000_y/b.jpg"), ("in/Aves/3111/a.jpg", "in/Insecta/3111/b.jpg")]
)
def test_two_folders_of_one_category_number_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    """One of them would be lost."""
    put(tmp_path, *names)
    with pytest.raises(DataError, match=r"have the same number [0-9]+: rename one of the two"):
        read_source(card("inaturalist", {"train": {"folder": "in"}}), tmp_path)


def test_links_in_torchvision_folders_make_no_image_count_twice(tmp_path: Path) -> None:
    """To itself, to another category; a category that is a link to another is refused."""
    put(tmp_path, "in/00000_a/1.jpg", "in/00001_b/2.jpg", "in/3.jpg", "in/00001_b/.cache/4.jpg")
    (tmp_path / "in/00000_a/self").symlink_to(".")
    (tmp_path / "in/00000_a/other").symlink_to("../00001_b")
    made = card("inaturalist", {"train": {"folder": "in"}})
    source = read_source(made, tmp_path)
    assert source.splits["train"].counts(2).tolist() == [1, 1]
    links = ", ".join(f"{tmp_path}/in/00000_a/{name}" for name in ("other", "self"))
    assert source.notes == [
        "left out, images directly in in and in no class folder: 1",
        "left out, hidden files and folders in in: 1",
        f"left out, since their images are listed elsewhere: {links}",
    ]
    (tmp_path / "in/00002_c").symlink_to("00000_a")
    with pytest.raises(DataError, match="00002_c is the folder of another class too: remove one of the two"):
        read_source(made, tmp_path)


def test_our_shards_packed_again_hold_the_same_samples(tiny_shards: Manifest, tmp_path: Path) -> None:
    """Another size and order: the same images with the same labels, split by split; class names are kept."""
    splits = {name: {"tars": f"{name}-*.tar"} for name in ("train", "test")}
    again = build_shards(card("webdataset", splits), tiny_shards.directory, tmp_path / "out", BuildOptions(seed=7))
    assert again.classes == tiny_shards.classes

    def samples(manifest: Manifest, split: str) -> list[tuple[int, bytes]]:
        reader = ShardReader(manifest.storage, manifest.split(split))
        return [(s.label, s.image) for s in map(reader.read, range(manifest.split(split).samples))]

    for split in splits:
        assert sorted(samples(again, split)) == sorted(samples(tiny_shards, split))
    assert samples(again, "train") != samples(tiny_shards, "train")
    assert again.split("train").class_counts == (30, 12, 5)


def test_long_tailed_part_of_shards(tiny_shards: Manifest, tmp_path: Path) -> None:
    """Repacking takes the options of every source."""
    whole = card("webdataset", {"train": {"tars": "train-*.tar"}})
    part = changed(whole, imbalance={"factor": 10}, validation_share=0.2)
    made = build_shards(part, tiny_shards.directory, tmp_path / "out")
    assert made.split("train").class_counts == (24, 7, 2)
    assert made.split("val").class_counts == (6, 2, 1)


def test_shards_of_others_are_read(tmp_path: Path) -> None:
    """Labels in .cls or under another key; braces; folders in names; other members are left alone."""
    for number in range(2):
        with wds.TarWriter(str(tmp_path / f"x-{number}.tar")) as tar:
            tar.write({"__key__": f"a/{number}", "jpg": encoded(seed=number), "cls": number, "txt": "caption"})
            tar.write({"__key__": f"b/{number}", "png": encoded(".png"), "cls": 1})
    source = read_source(card("webdataset", {"train": {"tars": "x-{0..1}.tar"}}), tmp_path)
    assert list(source.splits["train"].names) == [
        f"x-{n}.tar#{m}" for n in range(2) for m in (f"a/{n}.jpg", f"b/{n}.png")
    ]
    assert source.splits["train"].labels.tolist() == [0, 1, 1, 1]
    assert read_all(source)[0] == encoded(seed=0)
    with wds.TarWriter(str(tmp_path / "y.tar")) as tar:
        tar.write({"__key__": "a", "jpg": encoded(), "json": {"y": 0, "species": "owl"}})
        tar.write({"__key__": "text", "txt": "no image", "json": {"y": 0}})
    keys = card("webdataset", {"train": {"tars": "y.tar"}}, label_key="y", class_key="species")
    source = read_source(keys, tmp_path)
    assert source.classes == ("owl",)
    assert [str(bad) for bad in source.bad] == ["y.tar#text: no_image"]


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"other": 1}, r"z.tar#a has no label: its .json has no 'label' \(label_key\), no .cls"),
        ({"label": "cat"}, "label 'cat' is no number from 0"),
        ({"label": -1}, "label -1 is no number from 0"),
    ],
)
def test_labels_of_others_that_are_none_are_named(tmp_path: Path, about: dict[str, Any], message: str) -> None:
    """With tar and key."""
    with wds.TarWriter(str(tmp_path / "z.tar")) as tar:
        tar.write({"__key__": "a", "jpg": encoded(), "json": about})
    with pytest.raises(DataError, match=message):
        read_source(card("webdataset", {"train": {"tars": "z.tar"}}), tmp_path)


@pytest.mark.parametrize("damage", ["header", "cut"])
def test_damaged_tar_is_refused_not_shortened(tiny_shards: Manifest, tmp_path: Path, damage: str) -> None:
    """tarfile and webdataset would end at the place without a word."""
    tar = tmp_path / "train-00000.tar"
    raw = (tiny_shards.directory / tar.name).read_bytes()
    tar.write_bytes(raw if damage == "header" else raw[: len(raw) // 2 // 512 * 512])
    if damage == "header":
        with tarfile.open(tar) as archive:
            flip_byte(tar, archive.getmembers()[4].offset + 150)
    with pytest.raises(DataError, match=r"train-00000.tar is damaged"):
        read_source(card("webdataset", {"train": {"tars": "train-*.tar"}}), tmp_path)


def test_missing_tars_are_named(tmp_path: Path) -> None:
    """A pattern that fits nothing, a name that is not there."""
    for tars, message in (("x-*.tar", "no tar under .* is called x-"), ("x-{0..3}.tar", "x-0.tar is missing .4 of 4")):
        with pytest.raises(DataError, match=message):
            read_source(card("webdataset", {"train": {"tars": tars}}), tmp_path)


@pytest.fixture
def memory_url() -> Any:
    """A folder in fsspec's memory file system, of this process."""
    yield "memory://source"
    fsspec.filesystem("memory").store.clear()


def test_sources_are_read_from_a_url(memory_url: str, tmp_path: Path) -> None:
    """List, CSV, JSON and folders behind a URL give the shards that local ones give; output may be a URL too."""
    root = tmp_path / "root"
    for number in range(6):
        (root / "train" / f"c{number % 2}").mkdir(parents=True, exist_ok=True)
        (root / "train" / f"c{number % 2}" / f"{number}.jpg").write_bytes(encoded(seed=number))
    names = [f"train/c{n % 2}/{n}.jpg" for n in range(6)]
    (root / "list.txt").write_text("".join(f"{name} {n % 2}\n" for n, name in enumerate(names)))
    (root / "list.csv").write_text("path,label\n" + "".join(f"{name},c{n % 2}\n" for n, name in enumerate(names)))
    page = {
        "images": [{"id": n, "file_name": name} for n, name in enumerate(names)],
        "annotations": [{"image_id": n, "category_id": n % 2} for n in range(6)],
        "categories": [{"id": 0, "name": "c0"}, {"id": 1, "name": "c1"}],
    }
    (root / "train.json").write_text(json.dumps(page))
    fsspec.filesystem("memory").put(f"{root}/", "/source/", recursive=True)
    cards = [
        card("list", {"train": {"list": "list.txt"}}),
        card("csv", {"train": {"file": "list.csv"}}),
        card("inaturalist", {"train": {"annotations": "train.json"}}),
        folder_card(root),
    ]
    for number, made in enumerate(cards):
        local = build_shards(made, root, tmp_path / f"out{number}")
        remote = build_shards(made, memory_url, f"memory://shards/{number}")
        assert remote.splits == local.splits
        tar = f"{local.split('train').shards[0].name}.tar"
        assert remote.storage.read(tar) == (local.directory / tar).read_bytes()
        assert remote.storage.inside(".build").sizes() == {}

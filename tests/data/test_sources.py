"""Reading source images, and what is refused there."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paco_ds.data.pack.card import load_card
from paco_ds.data.pack.image_bytes import BadImage
from paco_ds.data.pack.read import read_source
from paco_ds.data.pack.source import Source
from paco_ds.data.pack.sources.folder import FolderCard, FolderSplit
from paco_ds.data.pack.sources.idx import read_idx
from paco_ds.data.pack.sources.inaturalist import INaturalistCard, INaturalistSplit
from paco_ds.errors import DataError
from tests.data.tiny import TINY_CARD, write_idx

SHIPPED = Path(__file__).parents[2] / "shards"
PIXELS = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


def test_idx_plain_and_gzipped_are_the_same(tmp_path: Path) -> None:
    """Compression is seen by the content."""
    write_idx(tmp_path / "plain", PIXELS)
    (tmp_path / "packed").write_bytes(gzip.compress((tmp_path / "plain").read_bytes()))
    assert (read_idx(tmp_path / "plain") == PIXELS).all()
    assert (read_idx(tmp_path / "packed") == PIXELS).all()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-1], r"has 39 bytes, which do not hold the shape \(2, 3, 4\)"),
        (lambda raw: raw + b"x", r"has 41 bytes, which do not hold"),
        (lambda raw: raw[:9], "do not hold the shape"),
        (lambda raw: b"\x89PNG" + raw, "no IDX file of unsigned bytes: it starts with '89 50 4e 47'"),
        (lambda raw: raw[:2] + b"\x0d" + raw[3:], "no IDX file of unsigned bytes"),
        (lambda raw: gzip.compress(raw)[:-10], "damaged gzip"),
        (lambda raw: b"", "no IDX file"),
    ],
)
def test_malformed_idx_is_refused(tmp_path: Path, damage: Any, message: str) -> None:
    """Cut, too long, another format, another type, cut gzip, empty."""
    write_idx(tmp_path / "file", PIXELS)
    (tmp_path / "file").write_bytes(damage((tmp_path / "file").read_bytes()))
    with pytest.raises(DataError, match=message):
        read_idx(tmp_path / "file")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], r"has shape \(3, 8, 8\) and train-labels \(2,\)"),
        ([0, 1, 3], "has label 3, but the card names 3 classes"),
        ([0, 1, 1], "no training image of eel"),
    ],
)
def test_idx_labels_that_do_not_fit_are_refused(tmp_path: Path, labels: list[int], message: str) -> None:
    """Another number than images, a class without name, a class without image."""
    (tmp_path / "card.yaml").write_text(TINY_CARD)
    for split in ("train", "test"):
        write_idx(tmp_path / f"{split}-images", np.zeros((3, 8, 8), np.uint8))
        write_idx(tmp_path / f"{split}-labels", np.arange(3, dtype=np.uint8))
    write_idx(tmp_path / "train-labels", np.array(labels, np.uint8))
    with pytest.raises(DataError, match=message):
        read_source(load_card(tmp_path / "card.yaml"), tmp_path)


def test_missing_root_is_named(tmp_path: Path) -> None:
    """The remedy is --root."""
    with pytest.raises(DataError, match=r"no folder .*gone with the images of .*give it as --root"):
        read_source(load_card(SHIPPED / "inaturalist2018.yaml"), tmp_path / "gone")


def test_shipped_images_are_the_long_tail_and_disjoint() -> None:
    """The profile of the card's comment; no image of one split is in another."""
    source = read_source(load_card(SHIPPED / "fashion-mnist-lt.yaml"), SHIPPED / "fashion-mnist-lt")
    counts = {name: samples.counts(10).tolist() for name, samples in source.splits.items()}
    assert counts["train"] == [1000, 599, 359, 215, 129, 77, 46, 27, 16, 10]
    assert counts["val"] == [400] * 10
    assert counts["test"] == [200] * 10
    images = {data for name in source.splits for data in read_all(source, name)}
    assert len(images) == sum(map(len, source.splits.values()))
    assert sum(file.stat().st_size for file in (SHIPPED / "fashion-mnist-lt").glob("*.gz")) <= 4_000_000


def test_shipped_normalisation_is_that_of_the_training_images() -> None:
    """mean and std of the card."""
    card = load_card(SHIPPED / "fashion-mnist-lt.yaml")
    pixels = read_idx(SHIPPED / "fashion-mnist-lt" / "train-images-idx3-ubyte.gz") / 255
    assert card.mean == pytest.approx([pixels.mean()] * 3, abs=1e-4)
    assert card.std == pytest.approx([pixels.std()] * 3, abs=1e-4)


def read_all(source: Source, split: str) -> list[bytes]:
    """The bytes of all images of a split, in their order."""
    samples = source.splits[split]
    rooms = [memoryview(bytearray(size + 1)) for size in samples.sizes.tolist()]
    return [bytes(source.images.read(samples, row, room)) for row, room in enumerate(rooms)]


def folders(root: Path, *files: str) -> FolderCard:
    """Put files under root, each holding its own name; a card with a split per top folder."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(file.encode())
    splits = {name: FolderSplit(folder=name) for name in sorted({f.split("/")[0] for f in files})}
    return FolderCard(name="mine", license="mine", source="folder", splits=splits)


def test_folders_keep_bytes_and_report_what_they_leave_out(tmp_path: Path) -> None:
    """Sorted class names are labels; other endings are counted; sub-folders are read."""
    card = folders(tmp_path, "train/b/1.JPEG", "train/a/x/2.png", "train/a/3.txt", "train/a/4.webp", "train/b/n")
    source = read_source(card, tmp_path)
    assert source.classes == ("a", "b")
    train = source.splits["train"]
    assert list(train.names) == ["train/a/4.webp", "train/a/x/2.png", "train/b/1.JPEG"]
    assert train.labels.tolist() == [0, 0, 1]
    assert read_all(source, "train") == [b"train/a/4.webp", b"train/a/x/2.png", b"train/b/1.JPEG"]
    assert source.ignored == {".txt": 1, "(no ending)": 1}


def test_order_of_classes_may_be_the_cards(tmp_path: Path) -> None:
    """A card that names classes fixes their labels."""
    card = folders(tmp_path, "train/a/1.jpg", "train/b/2.jpg").model_copy(update={"classes": ("b", "a")})
    train = read_source(card, tmp_path).splits["train"]
    assert dict(zip(train.names, train.labels, strict=True))["train/b/2.jpg"] == 0


def test_class_folders_that_differ_are_named(tmp_path: Path) -> None:
    """A split with other classes would give wrong labels without an error."""
    card = folders(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg", "val/c/4.jpg")
    message = r"split val .*does not have the classes of split train: missing b; not known c"
    with pytest.raises(DataError, match=message):
        read_source(card, tmp_path)


def test_folder_without_classes_is_refused(tmp_path: Path) -> None:
    """Images beside each other have no class."""
    with pytest.raises(DataError, match="one folder per class"):
        read_source(folders(tmp_path, "train/1.jpg"), tmp_path)


def test_what_cannot_be_taken_is_named_with_its_reason(tmp_path: Path) -> None:
    """Empty files are found before anything is built; the others stay."""
    card = folders(tmp_path, "train/a/1.jpg", "train/a/2.jpg")
    (tmp_path / "train/a/1.jpg").write_bytes(b"")
    source = read_source(card, tmp_path)
    assert [str(bad) for bad in source.bad] == ["train/a/1.jpg: empty"]
    assert list(source.splits["train"].names) == ["train/a/2.jpg"]


def test_image_that_changed_ends_the_build(tmp_path: Path) -> None:
    """A file that is gone when its turn comes is a bad image; one with other bytes makes the plan wrong."""
    source = read_source(folders(tmp_path, "train/a/1.jpg"), tmp_path)
    (tmp_path / "train/a/1.jpg").write_bytes(b"longer than it was")
    with pytest.raises(DataError, match=r"1.jpg changed while"):
        read_all(source, "train")
    (tmp_path / "train/a/1.jpg").unlink()
    with pytest.raises(BadImage, match=r"1.jpg: unreadable .No such file"):
        read_all(source, "train")


CATEGORIES = [{"id": 7, "name": "newt"}, {"id": 3, "name": "moth"}]
PAGE: dict[str, Any] = {
    "images": [{"id": 1, "file_name": "t/1.jpg"}, {"id": 2, "file_name": "t/2.jpg"}],
    "annotations": [{"image_id": 2, "category_id": 3}, {"image_id": 1, "category_id": 7}],
    "categories": CATEGORIES,
}


def naturalist(root: Path, page: object, **settings: str) -> INaturalistCard:
    """Two image files, one JSON page, its card."""
    (root / "t").mkdir()
    for name in ("1", "2"):
        (root / f"t/{name}.jpg").write_bytes(name.encode())
    (root / "train.json").write_text(json.dumps(page))
    splits = {"train": INaturalistSplit(annotations="train.json")}
    return INaturalistCard(name="n", license="n", source="inaturalist", splits=splits, **settings)


def test_inaturalist_categories_become_labels_in_id_order(tmp_path: Path) -> None:
    """Category 3 is label 0, category 7 label 1."""
    source = read_source(naturalist(tmp_path, PAGE), tmp_path)
    assert source.classes == ("moth", "newt")
    assert source.splits["train"].labels.tolist() == [1, 0]
    assert read_all(source, "train") == [b"1", b"2"]


def test_inaturalist_names_may_come_from_another_file(tmp_path: Path) -> None:
    """The official categories.json is a bare list."""
    (tmp_path / "categories.json").write_text('[{"id": 3, "name": "Moth"}, {"id": 7, "name": "Newt"}]')
    card = naturalist(tmp_path, PAGE, categories="categories.json")
    assert read_source(card, tmp_path).classes == ("Moth", "Newt")
    (tmp_path / "categories.json").write_text('[{"id": 3, "name": "Moth"}]')
    with pytest.raises(DataError, match=r"categories.json has no name for category 7"):
        read_source(card, tmp_path)


IMAGES, ANNOTATIONS = PAGE["images"], PAGE["annotations"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": ANNOTATIONS[:1]}, r"image 1 \(t/1.jpg\) has no annotation"),
        ({"annotations": [{"image_id": 1, "category_id": 9}]}, "image 1 has unknown category 9"),
        ({"annotations": [*ANNOTATIONS, {"image_id": 1, "category_id": 3}]}, "image 1 .* two categories"),
        ({"annotations": None}, "has no annotations: it must be a list"),
        ({"annotations": [{"image_id": 1}]}, "annotations has an entry without category_id"),
        ({"images": [{"id": 1, "file_name": "../1.jpg"}]}, "does not lie under the root"),
        ({"images": [{"id": 1, "file_name": " "}]}, "images has an entry without file_name"),
        ({"images": [IMAGES[0], IMAGES[1] | {"id": 1}]}, "images t/1.jpg and t/2.jpg have the same id 1: give each"),
        ({"images": [{"id": 2**63, "file_name": "t/1.jpg"}]}, r"has a whole number above 2\^63 - 1: number it anew"),
        ({"categories": [*CATEGORIES, {"id": 3, "name": "owl"}]}, "category 3 is 'moth' and 'owl': give each an id"),
        ({"categories": [{"id": 3, "name": " "}]}, "categories has an entry without name"),
        ({"categories": [{"id": [3], "name": "moth"}]}, "categories has an entry without id"),
        ({"info": float("nan")}, "is not JSON .*NaN.*: copy it again; if NaN or Infinity stands there, write null"),
    ],
)
def test_inaturalist_mistakes_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """Each with the file, the image or the category."""
    with pytest.raises(DataError, match=message):
        read_source(naturalist(tmp_path, PAGE | change), tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"id": [3], "name": "Moth"}, "categories has an entry without id"),
        ({"id": 3, "name": ""}, "categories has an entry without name"),
        ({"id": 7, "name": "Moth"}, "category 7 is 'Newt' and 'Moth': give each an id of its own"),
    ],
)
def test_inaturalist_mistakes_in_the_file_of_categories_are_named(
    tmp_path: Path, entry: dict[str, Any], message: str
) -> None:
    """As those of a page."""
    (tmp_path / "categories.json").write_text(json.dumps([{"id": 7, "name": "Newt"}, entry]))
    with pytest.raises(DataError, match=f"categories.json: {message}"):
        read_source(naturalist(tmp_path, PAGE, categories="categories.json"), tmp_path)


def test_inaturalist_page_of_a_spreadsheet_is_read(tmp_path: Path) -> None:
    """With a byte order mark and spaces around names; paths of one file are one image."""
    again = [{"id": 3, "file_name": "./t/1.jpg"}, {"id": 4, "file_name": "t//2.jpg"}]
    page = {
        "images": [*IMAGES, *again],
        "annotations": [*ANNOTATIONS, {"image_id": 3, "category_id": 7}, {"image_id": 4, "category_id": 3}],
        "categories": [{"id": 3, "name": " moth "}, {"id": 7, "name": "newt"}],
    }
    card = naturalist(tmp_path, page)
    (tmp_path / "train.json").write_text(json.dumps(page), encoding="utf-8-sig")
    source = read_source(card, tmp_path)
    assert source.classes == ("moth", "newt")
    assert list(source.splits["train"].names) == ["t/1.jpg", "t/2.jpg"]
    assert [str(bad) for bad in source.bad] == ["t/1.jpg: listed_twice", "t/2.jpg: listed_twice"]


def test_inaturalist_images_that_are_missing_or_listed_twice_are_bad(tmp_path: Path) -> None:
    """Both are named; what is there stays."""
    page = PAGE | {
        "images": [*IMAGES, {"id": 1, "file_name": "t/1.jpg"}, {"id": 3, "file_name": "t/9.jpg"}],
        "annotations": [*ANNOTATIONS, {"image_id": 3, "category_id": 3}],
    }
    source = read_source(naturalist(tmp_path, page), tmp_path)
    assert [str(bad) for bad in source.bad] == ["t/9.jpg: missing", "t/1.jpg: listed_twice"]
    assert list(source.splits["train"].names) == ["t/1.jpg", "t/2.jpg"]


def test_inaturalist_splits_must_share_categories(tmp_path: Path) -> None:
    """Labels would mean other classes; the differing ids are named."""
    card = naturalist(tmp_path, PAGE)
    more = PAGE | {"categories": [*CATEGORIES, {"id": 5, "name": "owl"}]}
    (tmp_path / "val.json").write_text(json.dumps(more))
    both = card.splits | {"val": INaturalistSplit(annotations="val.json")}
    with pytest.raises(DataError, match=r"val.json does not have the categories of .*train.json: 5"):
        read_source(card.model_copy(update={"splits": both}), tmp_path)


def test_inaturalist_splits_must_name_a_category_alike(tmp_path: Path) -> None:
    """Two exports that number their categories apart would swap the labels of val."""
    card = naturalist(tmp_path, PAGE)
    swapped = [{"id": 3, "name": "newt"}, {"id": 7, "name": "moth"}]
    (tmp_path / "val.json").write_text(json.dumps(PAGE | {"categories": swapped}))
    both = card.splits | {"val": INaturalistSplit(annotations="val.json")}
    with pytest.raises(DataError, match=r"category 3 is 'moth' in .*train.json and 'newt' in .*val.json: number"):
        read_source(card.model_copy(update={"splits": both}), tmp_path)


def test_inaturalist_missing_or_broken_page_is_named(tmp_path: Path) -> None:
    """The JSON file itself."""
    card = naturalist(tmp_path, PAGE)
    (tmp_path / "train.json").write_text("{")
    with pytest.raises(DataError, match=r"train.json is not JSON"):
        read_source(card, tmp_path)
    (tmp_path / "train.json").unlink()
    with pytest.raises(DataError, match=r"train.json is missing"):
        read_source(card, tmp_path)


def test_two_classes_of_one_name_are_refused(tmp_path: Path) -> None:
    """Classes are matched by name when images are added."""
    page = PAGE | {"categories": [{"id": 7, "name": "newt"}, {"id": 3, "name": "newt"}]}
    with pytest.raises(DataError, match="newt of n is the name of more than one class"):
        read_source(naturalist(tmp_path, page), tmp_path)

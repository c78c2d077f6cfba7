"""What a dataset card may say."""

from pathlib import Path

import pytest

from paco_ds.data.pack.card import folder_card, load_card
from paco_ds.errors import DataError
from tests.data.tiny import TINY_CARD

SHIPPED = Path(__file__).parents[2] / "shards"


def card(tmp_path: Path, text: str) -> Path:
    """Write a card."""
    (tmp_path / "card.yaml").write_text(text)
    return tmp_path / "card.yaml"


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_cards_are_valid(path: Path) -> None:
    """Every card in shards/ loads and has a training and a test split."""
    assert {"train", "test"} <= set(load_card(path).splits)


def test_inaturalist_has_the_published_normalisation() -> None:
    """As published for iNaturalist 2018."""
    card = load_card(SHIPPED / "inaturalist2018.yaml")
    assert card.mean == (0.466, 0.471, 0.380)
    assert card.std == (0.195, 0.194, 0.192)


def test_missing_card_points_to_those_that_ship(tmp_path: Path) -> None:
    """With the nearest names, beside which shards/README.md says what a card is."""
    with pytest.raises(DataError, match=r"no dataset card .*none.yaml: .*/shards; nearest: "):
        load_card(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("license: MIT", "licence: MIT", "unknown key 'licence'; did you mean 'license'"),
        ("images: train-images", "imges: train-images", r"splits.train: unknown key 'imges'; .*'images'"),
        ("source: idx", "source: idy", "source is 'idy', must be one of cifar, csv, folder, idx"),
        ("name: tiny", "name: [tiny", "is not valid YAML"),
        ("license: MIT\n", "", "license: Field required"),
        ("std: [0.25, 0.25, 0.25]", "std: [0.25, 0, 0.25]", r"std.1: Input should be greater than 0"),
        ("mean: [0.5, 0.5, 0.5]", "mean: [123, 116, 103]", r"mean.0: 123 is not within 0 to 1, .*: divide .* by 255"),
        ("cat, dog, eel", "cat, dog, cat", "classes names cat more than once"),
        (
            "test-images, labels: test-labels",
            "train-images, labels: train-labels",
            "train and test are the same",
        ),
        ("  test:", "  te.st:", r"splits.te.st.*pattern"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    """Each with the key and, where there is one, the nearest valid name."""
    assert old in TINY_CARD
    with pytest.raises(DataError, match=message):
        load_card(card(tmp_path, TINY_CARD.replace(old, new)))


def test_folders_without_a_card(tmp_path: Path) -> None:
    """The root's folders with the names of splits, where there are any; else the root is the training split."""
    assert {n: s.folder for n, s in folder_card(tmp_path).splits.items()} == {"train": "."}
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
    assert {n: s.folder for n, s in folder_card(tmp_path).splits.items()} == {
        "train": "train",
        "test": "test",
    }

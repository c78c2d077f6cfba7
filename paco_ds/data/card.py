"""Owns the dataset card: a YAML page that says what a data set is called, licensed and made of."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import Field, PositiveFloat, ValidationError, model_validator

from paco_ds.data.manifest import Name, Shots, StrictModel, Triple, validation_message
from paco_ds.errors import DataError

# ImageNet's, as in every published recipe without figures of its own.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class IdxSplit(StrictModel):
    """A pair of IDX files, gzipped or not: images uint8 [N, H, W], labels uint8 [N]."""

    images: str
    labels: str


class FolderSplit(StrictModel):
    """A folder with one folder of images per class."""

    folder: str


class INaturalistSplit(StrictModel):
    """A COCO-style JSON file of images, annotations and categories."""

    annotations: str


class _Card(StrictModel):
    name: str
    license: str
    homepage: str = ""
    root: str = "."  # relative to the card's folder
    mean: Triple = IMAGENET_MEAN
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = IMAGENET_STD
    shots: Shots = Shots()

    @model_validator(mode="after")
    def _no_repeats(self) -> Self:
        splits = list(getattr(self, "splits", {}).items())
        for (first, a), (second, b) in itertools.combinations(splits, 2):
            if a == b:
                raise ValueError(f"splits {first} and {second} are the same images")
        repeated = [name for name, n in Counter(getattr(self, "classes", None) or ()).items() if n > 1]
        if repeated:
            raise ValueError(f"classes names {', '.join(repeated)} more than once")
        return self


class IdxCard(_Card):
    """Images in IDX files; they have no encoded bytes, so they are stored as ``encoding``."""

    source: Literal["idx"]
    classes: tuple[str, ...]
    encoding: Literal["png"] = "png"
    splits: dict[Name, IdxSplit] = Field(min_length=1)


class FolderCard(_Card):
    """Images in a folder per class; ``classes`` fixes the order of labels, else it is that of the names."""

    source: Literal["folder"]
    classes: tuple[str, ...] | None = None
    splits: dict[Name, FolderSplit] = Field(min_length=1)


class INaturalistCard(_Card):
    """Images listed by COCO-style JSON; ``categories`` names a JSON file that holds the classes' names."""

    source: Literal["inaturalist"]
    categories: str | None = None
    splits: dict[Name, INaturalistSplit] = Field(min_length=1)


Card = IdxCard | FolderCard | INaturalistCard
_CARDS: dict[str, type[Card]] = {"idx": IdxCard, "folder": FolderCard, "inaturalist": INaturalistCard}
SPLIT_NAMES = ("train", "val", "test")


def load_card(path: str | Path) -> Card:
    """Read the card at ``path``.

    Raises:
        DataError: no such file, not YAML, an unknown kind of source, an unknown, missing or ill-typed key.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no dataset card {path}; shards/README.md says what one is")
    try:
        data = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"card {path} is not YAML: {' '.join(str(error).split())}") from error
    kind = data.get("source") if isinstance(data, dict) else None
    if kind not in _CARDS:
        raise DataError(f"card {path}: source is {kind!r}, must be one of {', '.join(_CARDS)}")
    try:
        return _CARDS[kind].model_validate(data)
    except ValidationError as error:
        raise DataError(f"card {path}: {validation_message(error)}") from error


def folder_card(root: Path) -> FolderCard:
    """A card for images without one: root/train, root/val, root/test where they are, else root as train."""
    found = [name for name in SPLIT_NAMES if (root / name).is_dir()]
    splits = {name: FolderSplit(folder=name) for name in found} if "train" in found else None
    return FolderCard(
        name=root.resolve().name,
        license="not stated",
        source="folder",
        splits=splits or {"train": FolderSplit(folder=".")},
    )
